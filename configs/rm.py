"""The reward model, and the stages before it.

python launch/run.py --config=configs/rm.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import front

STAGES = ("sft_short", "sft_long", "label", "rm")


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("rm", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the preset 7b, with the values of VLM-RLAIF (2402.03746)."""
  model, data = front.model_7b(), front.data_7b()
  config = front.make_recipe("rm", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
