"""DPO (2305.18290) on AI preferences without a reward model, and its earlier stages.

python launch/run.py --config=configs/dpo.py --workdir=runs/dpo
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.training import dpo

STAGES = ("sft_short", "sft_long", "label", "dpo", "eval")


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("dpo", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.dpo = dpo_tiny()
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the preset 7b, with DPO as in RLAIF-V (2405.17220)."""
  model, data = front.model_7b(), front.data_7b()
  config = front.make_recipe("dpo", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.dpo = dpo_7b()
  config.evaluate = front.evaluate_7b()
  return config


def dpo_tiny() -> ConfigDict:
  """Returns the section `dpo` of the preset tiny."""
  return front.make_section(
    dpo.default_config(),
    steps=40,
    batch_size=16,
    save_every=10,
    keep=4,
    optimizer=dict(learning_rate=3e-4, warmup_steps=4, schedule="cosine"),
  )


def dpo_7b() -> ConfigDict:
  """Returns the settings of one round of RLAIF-V (2405.17220), with LoRA.

  A round is 4 epochs over about 5,300 pairs in batches of 8, with a checkpoint every
  quarter of an epoch.
  """
  return front.make_section(
    dpo.default_config(),
    steps=2672,
    batch_size=8,
    save_every=167,
    keep=16,
    optimizer=dict(
      learning_rate=1e-5, warmup_steps=134, schedule="cosine", weight_decay=0.01
    ),
  )


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
