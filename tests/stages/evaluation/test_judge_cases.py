"""What judges are measured on: the policy's answers, and files of pairs and scores."""

import io
import json

import pytest

from tests.helpers.stage_runs import Log
from tests.stages.training.test_generative_rm import in_folder
from vlmrlaif_jax.runtime.answering import Reply
from vlmrlaif_jax.stages.evaluation import judge_cases


@pytest.fixture
def run(one, tmp_path):
  return in_folder(one, tmp_path)


@pytest.fixture
def log(tmp_path):
  with Log(tmp_path / "log", "judges", 1, stream=io.StringIO()) as log:
    yield log


@pytest.fixture
def examples(run):
  return [e for e in run.splits.prompts if e["truth"]["kind"] != "description"]


@pytest.fixture
def known(run, examples, monkeypatch, tmp_path, log):
  """Of each question an answer that was cut, two wrong ones and the right one."""

  def answers(run, variables, requests, sampling, *, seed):
    right = {e["question"]: e["truth"]["answer"] for e in examples}
    return [
      [Reply("Cut.", False), Reply("Blue rain.", True), Reply("Red rain.", True)]
      + [Reply(right[request.prompt], True)]
      for request in requests
    ]

  monkeypatch.setattr(judge_cases.answering, "answer", answers)
  assert judge_cases.answered(run, {}, [], tmp_path, log) == []
  return judge_cases.answered(run, {}, examples, tmp_path, log)


def test_pairs_are_of_whole_answers_that_truth_tells_apart(known, examples):
  pairs = judge_cases.pairs_of(known)
  assert [pair["id"] for pair in pairs] == [e["id"] for e in examples]
  for pair, example in zip(pairs, examples, strict=True):
    assert pair["output_1"] == "Blue rain." and pair["preference"] == 2
    assert pair["output_2"] == example["truth"]["answer"]


def test_truth_scores_answers_by_their_mistakes(run, known, log):
  run.config.judges.groups = 2
  _, groups = judge_cases.groups_of(run, known, log)
  assert len(groups) == 2
  assert groups[0].texts == ("Blue rain.", "Red rain.", known[0].texts[2])
  assert groups[0].human == (-1, -1, 0)


def test_scores_of_a_file_take_their_place(run, known, log, tmp_path):
  video = run.splits.benchmark[0]["video"]
  row = {"id": 1, "image_path": video, "instruction": "?", "answer": "x", "human": "4"}
  lost = row | {"id": 2, "image_path": "none.jpg"}
  path = tmp_path / "score.jsonl"
  path.write_text("\n".join(map(json.dumps, [row, row | {"answer": "y"}, lost])))
  run.config.judges.scores, run.config.judges.videos = str(path), "/"
  _, [group] = judge_cases.groups_of(run, known, log)
  assert (group.texts, group.human) == (("x", "y"), (4, 4))


def test_pairs_of_a_file_are_preferences_or_pair_tasks(run, log, tmp_path):
  assert judge_cases.of_file(run, log) == (run, [])
  run.config.judges.pairs = run.config.rm.preferences
  run.config.judges.videos = run.config.data.videos
  _, pairs = judge_cases.of_file(run, log)
  assert {pair["output_1"] for pair in pairs} & {"Blue rain."}
  video = run.splits.benchmark[0]["video"]
  row = {"image_path": video, "instruction": "?", "human_answer": "B",
         "answer1": {"answer": "x"}, "answer2": {"answer": "y"}}  # fmt: skip
  path = tmp_path / "pair.jsonl"
  path.write_text(json.dumps(row))
  run.config.judges.update(pairs=str(path), videos="/")
  _, [pair] = judge_cases.of_file(run, log)
  assert (pair["output_2"], pair["preference"]) == ("y", 2)
