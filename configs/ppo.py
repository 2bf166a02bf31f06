"""VLM-RLAIF, all of it: SFT -> AI preferences -> reward model -> PPO -> evaluation.

python launch/run.py --config=configs/ppo.py --workdir=runs/demo
python launch/run.py --config=configs/ppo.py:7b --workdir=runs/7b
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "rm", "ppo", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("ppo", STAGES, preset)
