"""GRPO whose reward checks the claims of each response, or a rubric.

python launch/run.py --config=examples/online_claims.py:claims --workdir=runs/claims
python launch/run.py --config=examples/online_claims.py:rubric --workdir=runs/rubric

The embedded world's truth is the judge. There is no reward model, so there are no
labels. docs/rewards.md describes both terms, and judges for other data.
"""

from ml_collections import ConfigDict

from configs import grpo

STAGES = ("sft_short", "sft_long", "grpo", "eval")


def get_config(term: str = "claims") -> ConfigDict:
  """Returns the recipe whose reward is the term `claims` or `rubric`."""
  config = grpo.get_config("tiny")
  config.stages = STAGES
  config.reward.terms = {
    term: {"kwargs": {"judge": "truth"}},
    "stop": {"weight": -1.0},
  }
  return config
