"""GRPO (2402.03300) on the scores of a reward model.

python launch/run.py --config=configs/grpo.py --workdir=runs/grpo
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "rm", "grpo", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  config = common.recipe("grpo", STAGES, preset)
  config.grpo.oracle.kind = "reward"
  config.grpo.rank_adv = "grpo_scalar"
  return config
