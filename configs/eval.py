"""Evaluation of SFT against PPO, and what comes before it: the recipe configs/ppo.py.

python launch/run.py --config=configs/eval.py --workdir=runs/demo

The benchmarks of papers, from their own files: configs/benchmarks.py.
"""

from ml_collections import ConfigDict

from configs import ppo


def get_config(preset: str = "tiny") -> ConfigDict:
  config = ppo.get_config(preset)
  config.recipe = "eval"
  return config
