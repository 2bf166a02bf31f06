"""The verdict and the table: the words follow the numbers."""

from pathlib import Path

import pytest

from vlmrlaif_jax.evals.summary import PERCENT, format_interval, select_comparable
from vlmrlaif_jax.report import tables
from vlmrlaif_jax.report.files import Workdir


def results(low, high, mean):
  """Two policies whose accuracies differ by `mean`, in [low, high]."""
  stat = {"mean": 0.5, "low": 0.47, "high": 0.53, "n": 900}
  return {
    "policies": {
      "sft": {"accuracy": stat, "hallucination": stat, "judge_score": stat},
      "ppo": {"accuracy": stat, "hallucination": stat, "judge_score": stat},
    },
    "difference": {
      name: {"mean": mean, "low": low, "high": high}
      for name in ("accuracy", "hallucination")
    },
  }


def run(results, before, after):
  """A workdir with these results."""
  return Workdir(Path(), [], "eval", results, (before, after))


def comparison(results, before, after):
  """The rows of the table, in order."""
  rows = tables.compare_all_policies({"run": run(results, before, after)})
  return [row["run"] for row in rows]


@pytest.mark.parametrize(
  "low, high, mean, end",
  [
    (0.01, 0.05, 0.03, "+3.0 points [+1.0, +5.0], better."),
    (-0.05, -0.01, -0.03, "−3.0 points [−5.0, −1.0], worse."),
    (-0.01, 0.05, 0.02, "+2.0 points [−1.0, +5.0], which may be chance."),
  ],
)
def test_verdict_follows_the_interval(low, high, mean, end):
  assert tables.format_verdict(run(results(low, high, mean), "sft", "ppo")) == (
    "Correct answers, held-out questions: PPO 50.0 % [47.0, 53.0], "
    f"SFT 50.0 % [47.0, 53.0]. Difference: {end}"
  )


def test_verdict_of_one_policy_compares_nothing():
  only = {"policies": {"sft": {"accuracy": {"mean": 0.5}}}}
  assert tables.format_verdict(run(only, "sft", "sft")) == (
    "Correct answers, held-out questions: SFT 50.0 %. "
    "There is no other policy to compare."
  )


def test_more_is_better_but_for_hallucination():
  rows = comparison(results(0.01, 0.05, 0.03), "sft", "ppo")
  assert {row["label"]: row["better"] for row in rows} == {
    "Correct answers": "ppo",
    "Unsupported statements": "sft",
    "Judge's score": None,
  }


def test_difference_that_may_be_chance_marks_nothing():
  rows = comparison(results(-0.01, 0.05, 0.02), "sft", "ppo")
  assert [row["better"] for row in rows] == [None, None, None]


def test_difference_that_was_not_measured_is_of_the_means():
  made = results(0.01, 0.05, 0.03)
  made["policies"]["ppo"]["judge_score"] = {"mean": 0.75}
  assert comparison(made, "sft", "ppo")[-1]["difference"] == "+0.25"


def test_kind_that_one_policy_lacks_is_not_measured_there():
  made = results(0.01, 0.05, 0.03)
  made["policies"]["ppo"]["motion.accuracy"] = {"mean": 0.25, "n": 4}
  row = comparison(made, "sft", "ppo")[1]
  assert row["cells"] == {"sft": "not measured", "ppo": "25.0 %"}
  assert row["difference"] == "not measured"


@pytest.mark.parametrize(
  "names, pair",
  [
    (["base", "sft", "ppo"], ("sft", "ppo")),
    (["sft", "dpo"], ("sft", "dpo")),
    (["sft"], ("sft", "sft")),
  ],
)
def test_compared(names, pair):
  assert select_comparable({name: {} for name in names}) == pair


def test_interval_is_in_points_or_plain():
  stat = {"mean": -0.126, "low": -0.25, "high": 0.5, "n": 1090}
  assert format_interval(stat, PERCENT) == "−12.6 % [−25.0, 50.0]"
  assert format_interval(stat, sign="+") == "−0.13 [−0.25, +0.50]"
  counted = PERCENT._replace(counted=True)
  assert format_interval(stat, counted) == "−12.6 % [−25.0, 50.0] of 1,090"
