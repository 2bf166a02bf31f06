"""SFT in two stages, short answers first, then long ones.

python launch/run.py --config=configs/sft.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import front

STAGES = ("sft_short", "sft_long")


def tiny() -> ConfigDict:
  model, data = front.model_tiny(), front.data_tiny()
  config = front.recipe("sft", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  return config


def llava_7b() -> ConfigDict:
  model, data = front.model_7b(), front.data_7b()
  config = front.recipe("sft", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
