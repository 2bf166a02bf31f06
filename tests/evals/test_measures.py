"""Measures of a handful of answers, by hand."""

import pytest

from vlmrlaif_jax.evals import measures
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.measures import Marked
from vlmrlaif_jax.evals.world_truth import Verdict

HOW = Resampling(["v0", "v0", "v1", "v2"], seed=0, resamples=200)


def short(kind, correct, reward=None):
  return Marked("a b c", True, Verdict(kind, correct, 0, [], None), reward)


def long(unsupported, claims, recall):
  wrong = ["a ring"] * unsupported
  return Marked("a", False, Verdict("description", None, claims, wrong, recall))


SFT = [short("count", True), short("motion", False), long(3, 4, 0.5), long(1, 6, 1.0)]
PPO = [short("count", True), short("motion", True), long(0, 4, 0.5), long(1, 1, 0.0)]


@pytest.fixture(scope="module")
def results():
  return measures.measure_all({"sft": SFT, "ppo": PPO}, ("sft", "ppo"), HOW)


@pytest.mark.parametrize(
  "name, sft, ppo",
  [
    ("accuracy", 1 / 2, 1.0),
    ("hallucination", 4 / 10, 1 / 5),  # Over all claims, not over descriptions.
    ("recall", 0.75, 0.25),
    ("words", 2.0, 2.0),
    ("stopped", 0.5, 0.5),
  ],
)
def test_measure_and_its_difference(results, name, sft, ppo):
  policies = results["policies"]
  assert policies["sft"][name]["mean"] == pytest.approx(sft)
  assert policies["ppo"][name]["mean"] == pytest.approx(ppo)
  assert results["difference"][name]["mean"] == pytest.approx(ppo - sft)


def test_interval_surrounds_the_mean(results):
  found = results["policies"]["sft"]["hallucination"]
  assert found["low"] == pytest.approx(1 / 6) and found["high"] == 0.75


def test_kinds_are_those_with_right_and_wrong_answers(results):
  means = {k: s["mean"] for k, s in results["policies"]["sft"]["by_kind"].items()}
  assert means == {"count": 1.0, "motion": 0.0}
  assert results["difference"]["by_kind"]["motion"]["mean"] == 1.0


def test_reward_is_left_out_where_there_is_none(results):
  assert "reward" not in results["policies"]["sft"]


def test_reward_is_a_mean_of_scores():
  marked = {"sft": [short("count", True, r) for r in (1.0, -2.0, 0.5, 2.5)]}
  found = measures.measure_all(marked, ("sft", "sft"), HOW)
  assert found["policies"]["sft"]["reward"]["mean"] == 0.5
  assert found["difference"] == {"by_kind": {}}


def test_policy_that_claims_nothing_has_no_rate_of_hallucination():
  marked = {"sft": SFT, "ppo": [*SFT[:2], long(0, 0, 0.0), long(0, 0, 0.0)]}
  found = measures.measure_all(marked, ("sft", "ppo"), HOW)
  assert "hallucination" not in found["policies"]["ppo"]
  assert "hallucination" not in found["difference"]
  assert found["policies"]["sft"]["hallucination"]["mean"] == 0.4


def judged(wins, truths):
  results = {"policies": {"sft": {}, "ppo": {}}, "difference": {}}
  measures.add_judge(results, wins, truths, ("sft", "ppo"), HOW)
  return results


def test_judges_score_is_the_share_of_wins():
  found = judged({0: 1.0, 1: 0.5, 3: 1.0}, {})
  assert found["policies"]["ppo"]["judge_score"]["mean"] == pytest.approx(5 / 6)
  assert found["policies"]["sft"]["judge_score"]["mean"] == pytest.approx(1 / 6)
  assert found["difference"]["judge_score"]["mean"] == pytest.approx(4 / 6)


def test_drift_is_what_the_judge_sees_beyond_truth():
  found = judged({0: 1.0, 1: 1.0, 2: 1.0, 3: 0.5}, {0: 1.0, 1: 0.0, 3: 0.5})["judge"]
  means = {name: found[name]["mean"] for name in found}
  expected = {"wins": 2.5 / 3, "truth_wins": 0.5, "drift": 1 / 3}
  assert means == pytest.approx(expected)


def test_judge_without_pairs_has_no_score():
  found = judged({}, {})
  assert found["judge"] == {} and found["difference"] == {}
