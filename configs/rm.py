"""The reward model, and what comes before it.

python launch/run.py --config=configs/rm.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "rm")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("rm", STAGES, preset)
