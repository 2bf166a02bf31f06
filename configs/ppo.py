"""The whole of VLM-RLAIF: SFT, AI preferences, reward model, PPO, evaluation.

python launch/run.py --config=configs/ppo.py --workdir=runs/demo
python launch/run.py --config=configs/ppo.py:tiny_qwen3vl --workdir=runs/qwen3vl
python launch/run.py --config=configs/ppo.py:7b --workdir=runs/7b
python launch/run.py --config=configs/ppo.py:qwen3vl_4b --workdir=runs/qwen3vl_4b
python launch/run.py --config=configs/ppo.py:7b_original --workdir=runs/original

The presets "7b_original" and "tiny_original" follow VLM-RLAIF's released code where it
differs from the paper; see docs/design.md. Its rules for length and end make answers
shorter and worse, so the other presets have none.
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.training import ppo

STAGES = ("sft_short", "sft_long", "label", "rm", "ppo", "eval")


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("ppo", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  config.reward = front.reward_tiny()
  config.ppo = front.make_section(
    ppo.default_config(),
    steps=30,
    batch_size=64,
    minibatches=2,
    kl_coef=0.3,
    save_every=10,
    samples_every=5,
    optimizer=dict(learning_rate=1.2e-3, warmup_steps=4),
  )
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the values of the paper (2402.03746): one epoch over 99k prompts."""
  model, data = front.model_7b(), front.data_7b()
  config = front.make_recipe("ppo", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  config.reward = front.reward_7b()
  config.ppo = front.make_section(
    ppo.default_config(),
    steps=386,
    batch_size=256,
    microbatches=16,
    epochs=2,
    minibatches=2,
    kl_coef=0.1,
    lam=1.0,
    save_every=10,
    samples_every=20,
    optimizer=dict(learning_rate=3e-5, warmup_steps=20, schedule="cosine"),
  )
  config.evaluate = front.evaluate_7b()
  return config


def follow_original(config: ConfigDict) -> ConfigDict:
  """Changes a config to follow VLM-RLAIF's released code.

  The code scores the last position, includes padding in losses and GAE, clamps the KL
  at 0, multiplies rewards by 10, clips absolute values, and adds length and stop terms.
  """
  config.ppo.update(
    mask_padding=False,
    kl_estimator="k1_clamped",
    reward_scale=10.0,
    lam=1.0,
  )
  config.reward.terms.stop.weight = -8.0
  config.reward.terms.length.weight = -10.0
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  presets = {
    "tiny": tiny,
    "7b": llava_7b,
    "tiny_original": lambda: follow_original(tiny()),
    "7b_original": lambda: follow_original(llava_7b()),
  }
  return front.choose_preset(presets, preset)
