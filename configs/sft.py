"""SFT in two stages, short answers first, then long ones.

python launch/run.py --config=configs/sft.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("sft", STAGES, preset)
