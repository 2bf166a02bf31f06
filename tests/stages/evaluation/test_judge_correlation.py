"""Scores of judges, by one comparison and by all, worked out by hand."""

import io
import json

import numpy as np
import pytest

from tests.helpers.stage_runs import StageLog
from tests.stages.training.test_generative_rm import in_folder
from vlmrlaif_jax.evals import judge_agreement
from vlmrlaif_jax.evals.judge_agreement import AnswerGroup
from vlmrlaif_jax.feedback.generative_rm import JUDGE_STYLES
from vlmrlaif_jax.runtime.answering import VideoReply
from vlmrlaif_jax.stages.evaluation import judge_correlation

WORTH = {"bad": 2, "fair": 5, "good": 8}
GROUPS = [
  AnswerGroup("a", "v1", "?", ("bad", "fair", "good"), (1, 2, 3)),
  AnswerGroup("b", "v2", "?", ("good", "bad"), (5, 1)),
  AnswerGroup("c", "v3", "?", ("fair", "good", "bad"), (3, 4, 1)),
]


@pytest.fixture
def run(one, tmp_path):
  return in_folder(one, tmp_path)


@pytest.fixture
def asked():
  return []


@pytest.fixture
def judge(run, asked):
  """Gives each answer its worth, and one more to what stands first."""

  def ask(queries):
    asked.extend(queries)
    found = []
    for query in queries:
      a, b = (
        query.prompt.split(f"Response {side}: ")[1].split("\n")[0] for side in "AB"
      )
      found.append(f"\\boxed{{{WORTH[a] + 1}, {WORTH[b]}}}")
    return found

  return judge_correlation.make_pairwise_scorer(run, ask, JUDGE_STYLES["paper"])


def test_groups_of_any_size_are_scored_in_their_order(judge):
  rows = judge(GROUPS)
  assert [row["id"] for row in rows] == ["a", "b", "c"]
  # In both orders half of all scores are one too high.
  assert rows[0]["grouped"] == rows[0]["single"] == [2.5, 5.5, 8.5]
  assert rows[1]["grouped"] == [8.5, 2.5] and rows[2]["grouped"] == [5.5, 8.5, 2.5]


def test_in_one_order_what_stands_first_gains(judge, run):
  run.config.judges.both_orders = False
  [row] = judge(GROUPS[:1])
  assert row["grouped"] == [3, 5.5, 8]


def test_nothing_is_asked_twice(judge, asked):
  judge(GROUPS)
  assert len(asked) == 6 + 2 + 6
  assert len({(q.video, q.prompt) for q in asked}) == len(asked)


def test_what_cannot_be_read_has_no_score(run):
  mute = judge_correlation.make_pairwise_scorer(
    run, lambda q: ["?"] * len(q), JUDGE_STYLES["paper"]
  )
  assert mute(GROUPS[1:2]) == [
    {"id": "b", "grouped": [None, None], "single": [None, None]}]  # fmt: skip


def test_correlations_are_written_and_kept(run, judge, tmp_path, asked):
  by_length = lambda groups: [
    {"id": g.id, "single": [-float(len(text)) for text in g.texts]} for g in groups
  ]
  mute = lambda groups: [{"id": g.id, "single": [None] * len(g.texts)} for g in groups]
  judges = {"grm": (judge, {}), "reward_model": (by_length, {}), "mute": (mute, {})}
  said = io.StringIO()
  with StageLog(tmp_path / "log", "judges", 1, stream=said) as log:
    told = judge_correlation.measure_correlations(run, judges, GROUPS, tmp_path, log)
    before = len(asked)
    assert (
      judge_correlation.measure_correlations(run, judges, GROUPS, tmp_path, log) == told
    )
  assert len(asked) == before
  assert told == json.loads((tmp_path / "scores.json").read_text())
  assert (told["groups"], told["answers"]) == (3, 8)
  scores, people = [2.5, 5.5, 8.5, 8.5, 2.5, 5.5, 8.5, 2.5], [1, 2, 3, 5, 1, 3, 4, 1]
  right = np.corrcoef(scores, people)[0, 1]
  assert told["judges"]["grm"]["grouped"]["mean"] == pytest.approx(right)
  assert told["judges"]["mute"] == {"single": None}
  assert "not measured" in said.getvalue()


def test_a_reward_model_scores_each_answer_alone(run, monkeypatch):
  def score(run, variables, examples, texts):
    assert [e["question"] for e in examples] == ["?"] * 5
    return np.array([WORTH[text] for text in texts])

  monkeypatch.setattr(judge_correlation.scoring, "score_texts", score)
  rows = judge_correlation.make_reward_group_scorer(run, {})(GROUPS[:2])
  assert [row["single"] for row in rows] == [[2, 5, 8], [8, 2]]


# Answers with scores: the policy's, as truth has them, and those of files.


@pytest.fixture
def log(tmp_path):
  with StageLog(tmp_path / "log", "judges", 1, stream=io.StringIO()) as log:
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
      [
        VideoReply("Cut.", False),
        VideoReply("Blue rain.", True),
        VideoReply("Red rain.", True),
      ]
      + [VideoReply(right[request.prompt], True)]
      for request in requests
    ]

  monkeypatch.setattr(judge_correlation.answering, "answer_requests", answers)
  assert judge_correlation.answer_questions(run, {}, [], tmp_path, log) == []
  return judge_correlation.answer_questions(run, {}, examples, tmp_path, log)


def test_pairs_are_of_whole_answers_that_truth_tells_apart(known, examples):
  pairs = [judge_agreement.make_pair(group) for group in known]
  assert [pair["id"] for pair in pairs] == [e["id"] for e in examples]
  for pair, example in zip(pairs, examples, strict=True):
    assert pair["output_1"] == "Blue rain." and pair["preference"] == 2
    assert pair["output_2"] == example["truth"]["answer"]


def test_truth_scores_answers_by_their_mistakes(run, known, log):
  run.config.judges.groups = 2
  _, groups = judge_correlation.make_answer_groups(run, known, log)
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
  _, [group] = judge_correlation.make_answer_groups(run, known, log)
  assert (group.texts, group.human) == (("x", "y"), (4, 4))
