"""Preferences by AI feedback, and what comes before them.

python launch/run.py --config=configs/label.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("label", STAGES, preset)
