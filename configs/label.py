"""Preferences by AI feedback, and what comes before them.

python launch/run.py --config=configs/label.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import front

STAGES = ("sft_short", "sft_long", "label")


def tiny() -> ConfigDict:
  model, data = front.model_tiny(), front.data_tiny()
  config = front.recipe("label", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  return config


def llava_7b() -> ConfigDict:
  model, data = front.model_7b(), front.data_7b()
  config = front.recipe("label", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
