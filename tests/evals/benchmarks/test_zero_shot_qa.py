"""Zero-shot QA: accuracy and score of one reply, worked out by hand."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import zero_shot_qa


def row(video, number, question, answer):
  return {"video_name": video, "question_id": number, "question": question,
          "answer": answer}  # fmt: skip


@pytest.fixture
def path(tmp_path):
  rows = [row("a", 0, "Who?", "man"), row("a", 1, "What?", "dog"),
          row("b", 2, "Where?", "park"), row("c", 3, "Why?", "fun")]  # fmt: skip
  return files.write(tmp_path / "qa.json", rows)


REPLIES = {
  "man": "{'pred': 'yes', 'score': 5}",
  "dog": "{'pred': 'no', 'score': 2}",
  "park": "{'pred': 'yes', 'score': 4}",
  "fun": "{'pred': 'no', 'score': 0}",
}
SAID = {"Who?": "A man.", "What?": "A cat.", "Where?": "A park.", "Why?": "No."}


def run(path, reply, said=SAID):
  return files.run(
    zero_shot_qa, files.model(said), files.judge(reply), files.config(path)
  )


def test_accuracy_and_score_are_of_one_reply(path):
  found = run(path, lambda case: REPLIES[case.answer])
  assert {k: v.mean for k, v in found.values.items()} == {
    "accuracy": 0.5,
    "score": 2.75,
  }
  assert found.counts == {"cases": 4, "unanswered": 0, "unjudged": 0, "unparsed": 0}


def test_half_a_reply_counts_for_neither(path):
  halves = {"man": "{'pred': 'yes'}", "dog": "{'score': 2}", "park": None}
  found = run(path, lambda case: (REPLIES | halves)[case.answer])
  assert {k: (v.mean, v.n) for k, v in found.values.items()} == {
    "accuracy": (0, 1), "score": (0, 1)}  # fmt: skip
  assert found.counts == {"cases": 4, "unanswered": 0, "unjudged": 1, "unparsed": 2}


def test_a_question_without_an_answer_is_not_scored(path):
  found = run(path, lambda case: REPLIES[case.answer], {"Who?": "A man."})
  assert found.values["accuracy"].mean == 1 and found.counts["unanswered"] == 3


def test_an_id_that_stands_twice_is_refused(path):
  files.write(path, [row("a", 0, "Who?", "man")] * 2)
  with pytest.raises(ValueError, match="question_id a:0 twice"):
    zero_shot_qa.load(files.config(path))


def test_a_missing_file_says_where_to_get_it(tmp_path):
  with pytest.raises(FileNotFoundError, match="MSVD-QA, MSRVTT-QA.*activitynet-qa"):
    zero_shot_qa.load(files.config(tmp_path / "none.json"))
