"""The reward model, and what comes before it.

python launch/run.py --config=configs/rm.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import front

STAGES = ("sft_short", "sft_long", "label", "rm")


def tiny() -> ConfigDict:
  model, data = front.model_tiny(), front.data_tiny()
  config = front.recipe("rm", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  return config


def llava_7b() -> ConfigDict:
  model, data = front.model_7b(), front.data_7b()
  config = front.recipe("rm", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
