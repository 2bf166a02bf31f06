"""What a base model can do of what the pipeline asks of it, against the truth.

python launch/run.py --config=configs/abilities.py --workdir=runs/abilities
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("abilities",)


def get_config(preset: str = "tiny") -> ConfigDict:
  return common.recipe("abilities", STAGES, preset)
