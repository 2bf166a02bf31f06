"""DPO (2305.18290) on AI preferences, without a reward model, and what comes before it.

python launch/run.py --config=configs/dpo.py --workdir=runs/dpo
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "dpo", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("dpo", STAGES, preset)
