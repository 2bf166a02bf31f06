"""Evaluation of PPO against SFT, after the other stages of configs/ppo.py.

python launch/run.py --config=configs/eval.py --workdir=runs/demo

configs/benchmarks.py runs the benchmarks of papers.
"""

from ml_collections import ConfigDict

from configs import ppo


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  config = ppo.get_config(preset)
  config.recipe = "eval"
  return config
