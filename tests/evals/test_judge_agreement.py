"""Judges held against people: choices, correlations worked out by hand, files."""

import json

import pytest

from vlmrlaif_jax.evals import judge_agreement
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.judge_agreement import AnswerGroup

HOW = Resampling(resamples=50)
BY_VIDEO = Resampling(list("aabbccdd"), seed=0, resamples=200)
BETTER = [1, 2, 1, 2, 1, 2, 1, 2]


def write(path, rows):
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def scored(id, answer, **more):
  return {"score_id": 0, "id": id, "image_path": f"image/{id}.jpg",
          "instruction": f"What is {id}?", "answer": answer, **more}  # fmt: skip


def test_answers_to_a_question_are_a_group(tmp_path):
  rows = [scored(1, "a", Human_answer=3), scored(2, "b", human="4"),
          scored(1, "c", Human_answer=5)]  # fmt: skip
  found = judge_agreement.load_groups(write(tmp_path / "score.jsonl", rows), "videos")
  assert found == [
    AnswerGroup(
      "1:image/1.jpg", "videos/image/1.jpg", "What is 1?", ("a", "c"), (3, 5)
    ),
    AnswerGroup("2:image/2.jpg", "videos/image/2.jpg", "What is 2?", ("b",), (4,)),
  ]


def test_ties_are_no_preferences(tmp_path):
  row = {"image_path": "0.jpg", "instruction": "?", "answer1": {"answer": "x"},
         "answer2": {"answer": "y"}}  # fmt: skip
  rows = [row | {"pair_id": i, "human_answer": said} for i, said in enumerate("ACB")]
  found = judge_agreement.load_pairs(write(tmp_path / "pair.jsonl", rows), "videos")
  assert [(p["id"], p["preference"]) for p in found] == [("0", 1), ("2", 2)]
  assert found[0]["output_2"] == "y" and found[0]["video"] == "videos/0.jpg"


def group(scores, video="v"):
  return AnswerGroup("", video, "", tuple("x" * len(scores)), tuple(scores))


def test_correlation_is_over_all_answers_that_have_a_score():
  # Of (1, 1), (2, 3), (3, 2): a covariance of 1/3, and variances of 2/3 each.
  groups = [group((1, 9, 3)), group((2,), "w")]
  found = judge_agreement.correlate_with_people(
    groups, [[1.0, None, 2.0], [3.0]], Resampling(resamples=50)
  )
  assert found["mean"] == pytest.approx(0.5) and found["n"] == 3


def answers(texts, scores):
  return AnswerGroup("a", "a.mp4", "What?", tuple(texts), tuple(scores))


def test_a_pair_is_the_first_two_that_differ_in_scores():
  pair = judge_agreement.make_pair(answers("xyzw", [-1, -1, 0, -3]))
  assert (pair["output_1"], pair["output_2"], pair["preference"]) == ("x", "z", 2)
  pair = judge_agreement.make_pair(answers("xy", [0, -2]))
  assert (pair["output_1"], pair["preference"]) == ("x", 1)
  assert pair["question"] == "What?"


def test_answers_alike_in_scores_are_no_pair():
  assert judge_agreement.make_pair(answers("xy", [-1, -1])) is None
  assert judge_agreement.make_pair(answers("x", [0])) is None


@pytest.mark.parametrize("scores", [[2.0, 2.0, 2.0], [None, None, None]])
def test_a_judge_that_says_one_thing_has_none(scores):
  assert (
    judge_agreement.correlate_with_people([group((1, 2, 3))], [scores], HOW) is None
  )


def test_other_files_are_refused(tmp_path):
  path = write(tmp_path / "score.jsonl", [scored(1, "a", Human_answer="good")])
  with pytest.raises(ValueError, match="line 1: .*must have a number, got 'good'"):
    judge_agreement.load_groups(path, "videos")
  with pytest.raises(ValueError, match="line 1: it has no .'answer1'"):
    judge_agreement.load_pairs(path, "videos")
  with pytest.raises(FileNotFoundError, match="MLLM-as-a-Judge comes from"):
    judge_agreement.load_groups(tmp_path / "none.jsonl", "videos")


def test_the_higher_score_is_the_choice():
  scores = [(8.0, 4.0), (4.0, 8.0), (5.0, 5.0), None]
  assert list(map(judge_agreement.choose_by_scores, scores)) == [1, 2, 0, None]


def test_shares_are_of_all_pairs():
  found = judge_agreement.measure_accuracy(
    [1, 2, 1, 1, 0, 0, None, 2], BETTER, BY_VIDEO
  )
  mean = {name: stats["mean"] for name, stats in found.items()}
  assert (mean["accuracy"], mean["tied"], mean["unread"]) == (4 / 8, 2 / 8, 1 / 8)
  assert found["accuracy"]["low"] <= 0.5 <= found["accuracy"]["high"]
  assert found["accuracy"]["n"] == 8


def test_slot_bias_is_of_who_chooses():
  bias = lambda choices: judge_agreement.measure_accuracy(choices, BETTER, BY_VIDEO)[
    "slot_bias"
  ]["mean"]
  assert bias([1] * 8) == 0.5
  assert bias([2] * 8) == -0.5
  assert bias(BETTER) == 0
  # Chooses twice, both times the first, which is the better once.
  assert bias([1, 1, 0, 0, None, None, 0, 0]) == 0.5


def test_who_never_chooses_has_no_slot_bias():
  assert "slot_bias" not in judge_agreement.measure_accuracy(
    [None] * 8, BETTER, BY_VIDEO
  )


def test_a_difference_is_of_accuracies_on_the_same_pairs():
  choices = {"one": [1] * 8, "none": [None] * 8, "all": BETTER}
  found = judge_agreement.compare_accuracies(choices, BETTER, BY_VIDEO)
  assert {name: stats["mean"] for name, stats in found.items()} == {
    "one": 0.5,
    "none": 1.0,
  }
