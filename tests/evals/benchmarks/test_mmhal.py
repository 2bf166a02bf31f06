"""MMHal-Bench: ratings and hallucinations worked out by hand."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import mmhal


def row(kind, question, answer):
  return {"image_src": "https://a.org/b/c.jpg", "question_type": kind,
          "question": question, "image_content": ["dog", "sky"],
          "gt_answer": answer}  # fmt: skip


@pytest.fixture
def path(tmp_path):
  rows = [row("attribute", "1?", "a"), row("attribute", "2?", "b"),
          row("holistic", "3?", "c"), row("holistic", "4?", "d")]  # fmt: skip
  return files.write(tmp_path / "response_template.json", rows)


REPLIES = {"a": "Rating: 2", "b": "rating: 3", "c": '{"rating": 6}', "d": "Rating: 6"}
SAID = {"1?": "x", "2?": "x", "3?": "x", "4?": "x"}


def run(path, replies=REPLIES, said=SAID, asked=None):
  judge = files.judge(lambda case: replies[case.answer], asked)
  return files.run(mmhal, files.model(said), judge, files.config(path))


def test_below_three_is_a_hallucination(path):
  found = run(path)
  assert {name: value.mean for name, value in found.values.items()} == {
    "rating": 17 / 4, "hallucination": 1 / 4,
    "attribute.rating": 5 / 2, "attribute.hallucination": 1 / 2,
    "holistic.rating": 6, "holistic.hallucination": 0,
  }  # fmt: skip


def test_what_cannot_be_read_is_counted_and_not_scored(path):
  found = run(path, REPLIES | {"a": "Fine.", "b": None}, SAID | {"4?": None})
  assert found.counts == {"cases": 4, "unanswered": 1, "unjudged": 1, "unparsed": 1}
  assert (found.values["rating"].mean, found.values["rating"].n) == (6, 1)


def test_judge_reads_what_the_image_holds(path):
  asked = []
  run(path, asked=asked)
  assert "holds: dog, sky\nQuestion: 1?\nA correct answer: a\n" in asked[0][0].prompt
  assert asked[0][0].video == "videos/c.jpg"


@pytest.mark.parametrize(
  ("reply", "rating"),
  [("**Rating: 0**", 0), ("Rating: 4. Good.", 4), ("Rating: 7", None), ("4", 4),
   ("rating: 1 or rating: 2", None), ("rating: 5, so rating: 5", 5),
   ("rating: 3.5", None), ("score: 5", 5), ("<think>rating: 1</think>rating: 4", 4),
   ("Rating: 4\nGood.", 4)],
)  # fmt: skip
def test_one_rating_is_read(reply, rating):
  found = mmhal.parse_reply(reply)
  assert (found and found["rating"]) == rating


def test_other_files_are_refused(path, tmp_path):
  files.write(path, [{"question": "?"}])
  with pytest.raises(ValueError, match=r"(?s)record 1: it has no .*Shengcao1006"):
    mmhal.load(files.config(path))
  with pytest.raises(FileNotFoundError, match="no file at .*MMHal-Bench comes from"):
    mmhal.load(files.config(tmp_path / "none.json"))
