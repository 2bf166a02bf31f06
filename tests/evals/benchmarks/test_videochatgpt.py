"""Video-ChatGPT's benchmark: five qualities, worked out by hand."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import videochatgpt


@pytest.fixture
def folder(tmp_path):
  row = lambda video, q, a: {"video_name": video, "Q": q, "A": a}
  files.write(tmp_path / "generic_qa.json", [row("v_1", "Who?", "A {man}.")])
  files.write(
    tmp_path / "temporal_qa.json",
    [row("v_1", "When?", "Now."), row("v_2", "And?", "No.")],
  )
  twice = {"video_name": "v_2", "Q1": "How?", "Q2": "In what way?", "A": "Well."}
  files.write(tmp_path / "consistency_qa.json", [twice])
  return tmp_path


SAID = {"Who?": "Ann.", "When?": "Then.", "And?": "Yes.", "How?": "Ill.",
        "In what way?": "Fine."}  # fmt: skip


def run(folder, reply, said=SAID, asked=None):
  judge = files.judge(reply, asked)
  return files.run(videochatgpt, files.model(said), judge, files.config(folder))


def test_each_quality_is_the_mean_of_its_own_file(folder):
  scores = {"correctness": 1, "detail": 2, "context": 3, "consistency": 5}

  def reply(case):
    quality = case.id.split(":")[0]
    temporal = {"Then.": "4", "Yes.": "1"}.get(case.responses[0])
    return f"{{'score': {scores.get(quality, temporal)}}}"

  found = run(folder, reply)
  means = {name: value.mean for name, value in found.values.items()}
  assert means == {**scores, "temporal": 2.5}
  assert found.values["temporal"].n == 2
  assert found.counts["cases"] == 6


def test_consistency_is_judged_by_both_questions_and_both_answers(folder):
  asked = []
  run(folder, lambda case: "3", asked=asked)
  [case] = asked[-1]
  assert case.id.startswith("consistency:") and case.responses == ("Ill.", "Fine.")
  for told in ("1: How?", "2: In what way?", "question 1: Ill.", "question 2: Fine.",
               "answer: Well."):  # fmt: skip
    assert told in case.prompt


def test_braces_of_an_answer_stay(folder):
  asked = []
  run(folder, lambda case: "3", asked=asked)
  assert "Correct answer: A {man}." in asked[0][0].prompt
  assert 'such as {"score": 3}.' in asked[0][0].prompt


def test_what_cannot_be_read_is_counted_and_left_out(folder):
  found = run(
    folder, lambda case: "Fine!" if case.responses == ("Then.",) else "score: 4"
  )
  assert found.values["temporal"].mean == 4 and found.values["temporal"].n == 1
  assert found.counts["unparsed"] == 1


def test_half_an_answer_to_two_questions_is_not_judged(folder):
  asked, said = [], {k: v for k, v in SAID.items() if k != "In what way?"}
  found = run(folder, lambda case: "3", said, asked)
  assert found.counts["unanswered"] == 1
  assert "consistency" not in found.values
  assert asked[-1] == []


def test_a_missing_file_says_what_is_expected(folder):
  (folder / "temporal_qa.json").unlink()
  with pytest.raises(
    FileNotFoundError, match="temporal_qa.json: Video-ChatGPT's .*com"
  ):
    videochatgpt.load(files.config(folder))


def test_the_qualities_have_prompts_of_their_own():
  assert len(set(videochatgpt.PROMPTS.values())) == 5
