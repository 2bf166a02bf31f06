"""Held-out questions: measures of a handful of answers, and a judge, by hand."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.evals import bootstrap, world_truth
from vlmrlaif_jax.evals.benchmarks import held_out, protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkModel, BenchmarkReply
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.feedback.pairwise_judge import PairOutcome

HOW = Resampling(resamples=200)
INVENTED = " The small red blob stays still."  # Of no known form: one statement.


def example(id, video, question, kind, answer, seen):
  truth = {"scene": scene.scene_to_json(seen), "kind": kind, "answer": answer}
  return {
    "id": id, "video": f"{video}.mp4", "question": question, "answer": "",
    "source": "", "turns": [], "truth": truth,
  }  # fmt: skip


@pytest.fixture(scope="module")
def examples():
  """Two short questions about a video, and descriptions of two others."""
  rng = np.random.default_rng(0)
  one, two, three = (scene.sample_scene(rng) for _ in range(3))
  asked = language.make_questions(one, rng)
  shorts = [
    example(kind, "v0", asked[kind].question, kind, asked[kind].answer, one)
    for kind in ("attribute", "motion")
  ]
  return shorts + [
    example(f"d{i}", f"v{i}", language.DESCRIBE_EVENTS, "description", told, seen)
    for i, seen in enumerate((two, three), 1)
    for told in (language.describe_scene(seen),)
  ]


def model(said, reward=None):
  replies = lambda questions: [
    said[q.id] and BenchmarkReply(said[q.id]) for q in questions
  ]
  return BenchmarkModel(replies, compute_rewards=reward)


def rows_of(examples, said, reward=None):
  made = model(said, reward)
  return held_out.run(examples, made, world_files.EXACT, ConfigDict())


def scores(rows):
  return protocol.average_scores(rows, HOW).values


@pytest.fixture(scope="module")
def right(examples):
  return {e["id"]: e["truth"]["answer"] for e in examples}


@pytest.fixture(scope="module")
def wrong(right):
  return {id: text + INVENTED for id, text in right.items()}


def claims(text):
  return len(dict.fromkeys(language.split_claims(text)))


def test_right_answers_have_full_marks(examples, right):
  found = scores(rows_of(examples, right))
  means = {name: value.mean for name, value in found.items()}
  assert means.pop("words") == np.mean([len(text.split()) for text in right.values()])
  assert means == {
    "accuracy": 1, "attribute.accuracy": 1, "motion.accuracy": 1,
    "hallucination": 0, "recall": 1, "stopped": 1, "description.f1": 1,
    "mean_of_kinds": 1,
  }  # fmt: skip
  assert (found["accuracy"].n, found["recall"].n, found["stopped"].n) == (2, 2, 4)


def test_hallucination_is_over_all_claims_and_not_over_descriptions(
  examples, right, wrong
):
  said = {**right, "d1": wrong["d1"]}
  found = scores(rows_of(examples, said))["hallucination"]
  total = claims(said["d1"]) + claims(said["d2"])
  assert found.mean == pytest.approx(1 / total)
  assert found.low == 0 and found.high == pytest.approx(1 / claims(said["d1"]))


def test_measures_by_kind_stand_last(examples, right):
  names = list(scores(rows_of(examples, right)))
  assert sorted(names[-3:]) == [
    "attribute.accuracy",
    "description.f1",
    "motion.accuracy",
  ]


def test_each_kind_has_the_same_weight_in_the_mean_of_kinds(examples, right, wrong):
  said = {**right, "d1": wrong["d1"], "motion": "The red object stays up."}
  found = scores(rows_of(examples, said))
  f1 = found["description.f1"].mean
  assert 0 < f1 < 1
  np.testing.assert_allclose(found["mean_of_kinds"].mean, (1 + 0 + f1) / 3)
  # Five questions of one kind count as one.
  many = [{**examples[0], "id": f"a{i}"} for i in range(4)]
  said |= {each["id"]: right["attribute"] for each in many}
  again = scores(rows_of([*examples, *many], said))
  np.testing.assert_allclose(again["mean_of_kinds"].mean, (1 + 0 + f1) / 3)
  assert again["accuracy"].mean > found["accuracy"].mean


def test_a_single_kind_has_no_mean_of_kinds(examples, right):
  assert "mean_of_kinds" not in scores(rows_of(examples[:1], right))


def test_f1_of_a_description_by_hand():
  verdict = world_truth.TruthVerdict("description", None, 4, ["a", "b"], 1 / 3)
  np.testing.assert_allclose(
    verdict.compute_f1(), 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
  )
  assert verdict._replace(recall=0.0).compute_f1() == 0


def test_policy_that_claims_nothing_has_no_rate_of_hallucination(examples, right):
  said = {**right, "d1": "", "d2": ""}
  rows = held_out.run(
    examples,
    BenchmarkModel(
      lambda questions: [BenchmarkReply(said[q.id], False) for q in questions]
    ),
    world_files.EXACT,
    ConfigDict(),
  )
  found = scores(rows)
  assert "hallucination" not in found
  assert found["recall"].mean == 0 and found["stopped"].mean == 0
  before, after = ([row._asdict() for row in each] for each in (rows, rows))
  assert (
    bootstrap.compute_paired_difference(before, after, "hallucination", HOW) is None
  )


def test_reward_is_a_mean_of_scores_and_left_out_where_there_is_none(examples, right):
  assert "reward" not in scores(rows_of(examples, right))
  reward = lambda rows, replies: [1.0, -2.0, None, 2.5]
  assert scores(rows_of(examples, right, reward))["reward"].mean == 0.5  # Of three.


def test_what_has_no_answer_is_counted_and_not_scored(examples, right):
  asked = []
  reward = lambda rows, replies: asked.extend(e["id"] for e in rows) or [0] * 3
  rows = rows_of(examples, {**right, "d1": None}, reward)
  assert [row.fault for row in rows] == ["", "", "unanswered", ""]
  assert asked == ["attribute", "motion", "d2"] and scores(rows)["recall"].n == 1


def test_no_answer_at_all_is_an_error(examples, right):
  with pytest.raises(UserError, match="evaluate.prompt_len"):
    rows_of(examples, dict.fromkeys(right))


# The judge.


def compared(examples, first, second, outcomes, asked=None):
  """Rows of both, where the judge has these outcomes of answers that differ."""

  def judge_pairs(pairs):
    if asked is not None:
      asked.extend(pairs)
    return outcomes

  both = rows_of(examples, first), rows_of(examples, second)
  return held_out.compare_policies(examples, both, judge_pairs)


def test_only_unlike_answers_are_judged(examples, right, wrong):
  asked, said = [], {**right, "motion": wrong["motion"], "d2": wrong["d2"]}
  tie = PairOutcome("tie")
  before, _ = compared(examples, said, right, [tie, tie], asked)
  assert [(p.id, p.output_1, p.output_2) for p in asked] == [
    (id, wrong[id], right[id]) for id in ("motion", "d2")
  ]
  assert [row.details.get("judgement") for row in before] == [None, "tie"] * 2


def test_judges_score_is_the_share_of_wins(examples, right, wrong):
  outcomes = [
    PairOutcome("kept", 2),
    PairOutcome("tie"),
    PairOutcome("empty"),
    PairOutcome("kept", 2),
  ]
  before, after = compared(examples, wrong, right, outcomes)
  assert scores(after)["judge_score"].mean == pytest.approx(5 / 6)
  assert scores(before)["judge_score"].mean == pytest.approx(1 / 6)
  both = ([row._asdict() for row in rows] for rows in (before, after))
  change = bootstrap.compute_paired_difference(*both, "judge_score", HOW)
  assert (change.mean, change.n) == (pytest.approx(4 / 6), 3)


def test_verdicts_that_cannot_be_read_are_counted(examples, right, wrong):
  outcomes = [
    PairOutcome("kept", 2),
    PairOutcome("unparsable"),
    PairOutcome("empty"),
    PairOutcome("tie"),
  ]
  before, after = compared(examples, wrong, right, outcomes)
  unread = scores(after)["judge_unread"]
  assert (unread.mean, unread.n) == (pytest.approx(1 / 3), 3)
  assert "judge_unread" not in scores(before)


def test_drift_is_what_the_judge_sees_beyond_truth(examples, right, wrong):
  # The right answers are second, and lose twice.
  outcomes = [
    PairOutcome("kept", 1),
    PairOutcome("kept", 2),
    PairOutcome("kept", 1),
    PairOutcome("tie"),
  ]
  before, after = compared(examples, wrong, right, outcomes)
  found = {name: value.mean for name, value in scores(after).items()}
  assert (found["truth_score"], found["judge_drift"]) == (1, 1.5 / 4 - 1)
  turned = {name: value.mean for name, value in scores(before).items()}
  assert turned["truth_score"] == 0 and "judge_drift" not in turned


def test_truth_may_prefer_either_or_neither(examples, right, wrong):
  other = right["d1"] + " The large red blob stays still."  # As wrong as `wrong`.
  first = {**wrong, "motion": right["motion"]}
  second = {**right, "motion": wrong["motion"], "d1": other}
  _, after = compared(examples, first, second, [PairOutcome("tie")] * 4)
  assert [row.values["truth_score"] for row in after] == [1, 0, 0.5, 1]


def test_drift_is_where_truth_is_known(examples, right, wrong):
  users = [{**e, "answer": "A cat.", "truth": {}} for e in examples[:1]]
  users[0].pop("truth")
  _, after = compared(users, wrong, right, [PairOutcome("kept", 2)])
  assert set(after[0].values) & {"judge_score", "truth_score"} == {"judge_score"}
