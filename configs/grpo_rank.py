"""Oracle-RLAIF (2510.02561): an oracle orders a group of responses; GRPO on ranks.

python launch/run.py --config=configs/grpo_rank.py --workdir=runs/rank

The oracle is the reward model's order, or --config.grpo.oracle.kind=list|pairs|truth.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "rm", "grpo", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("grpo_rank", STAGES, preset)
