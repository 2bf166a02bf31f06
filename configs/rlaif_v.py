"""RLAIF-V (2405.17220): claims judged one by one, DPO, again from where that led to.

python launch/run.py --config=configs/rlaif_v.py --workdir=runs/rlaif_v

Each of the `rounds` samples anew from the policy of the last, labels by divide and
conquer, trains by DPO, and takes its best checkpoint on held-out prompts.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "round", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  config = common.recipe("rlaif_v", STAGES, preset)
  config.dpo.select = "claims"
  if preset == "tiny":  # So small a model is so sure that at 0.7 its answers are alike.
    config.claims.temperature = 1.0
  return config
