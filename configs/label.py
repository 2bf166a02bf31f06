"""Preferences by AI feedback, and what comes before them.

    python launch/run.py --config=configs/label.py --workdir=runs/demo
"""

from configs import common
from ml_collections import ConfigDict

STAGES = ("sft_short", "sft_long", "label")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("label", STAGES, preset)
