"""GRPO (2402.03300) on the scores of a reward model.

python launch/run.py --config=configs/grpo.py --workdir=runs/grpo
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.training import grpo

STAGES = ("sft_short", "sft_long", "label", "rm", "grpo", "eval")


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("grpo", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  config.reward = front.reward_tiny()
  config.grpo = front.make_section(
    grpo.default_config(),
    steps=30,
    batch_size=24,  # Prompts, each with `samples` responses.
    samples=5,
    minibatches=2,
    oracle=dict(kind="reward"),
    advantage="grpo_scalar",
    kl_coef=0.04,
    save_every=10,
    samples_every=5,
    optimizer=dict(learning_rate=5e-4, warmup_steps=4),
  )
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the sizes of Oracle-RLAIF (2510.02561), for comparison with it."""
  model, data = front.model_7b(), front.data_7b()
  config = front.make_recipe("grpo", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  config.reward = front.reward_7b()
  config.grpo = front.make_section(
    grpo.default_config(),
    steps=1544,
    batch_size=64,
    microbatches=2,  # 16 prompts each, on at most 16 devices: groups are not divided.
    samples=5,
    minibatches=2,
    oracle=dict(kind="reward"),
    advantage="grpo_scalar",
    kl_coef=0.1,
    save_every=10,
    samples_every=50,
    optimizer=dict(learning_rate=3e-5, warmup_steps=20, schedule="cosine"),
  )
  config.evaluate = front.evaluate_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
