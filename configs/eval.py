"""Evaluation of SFT against PPO, and what comes before it.

python launch/run.py --config=configs/eval.py --workdir=runs/demo

The benchmarks of papers, from their own files: configs/benchmarks.py.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "rm", "ppo", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("eval", STAGES, preset)
