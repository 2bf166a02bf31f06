"""Oracle-RLAIF (2510.02561): an oracle orders a group of responses; GRPO on ranks.

python launch/run.py --config=configs/grpo_rank.py --workdir=runs/rank

The oracle is the reward model's order, or --config.grpo.oracle.kind=list|pairs|truth.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "rm", "grpo", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  config = common.recipe("grpo_rank", STAGES, preset)
  if preset == "7b":
    # As reported: 4 epochs over 99k prompts, each with a reference of its own.
    config.grpo.update(steps=6188, kl_anchor="epoch_start", kl_dir="old_to_new")
  return config
