"""VLM-RLAIF, all of it: SFT -> AI preferences -> reward model -> PPO -> evaluation.

python launch/run.py --config=configs/ppo.py --workdir=runs/demo
python launch/run.py --config=configs/ppo.py:7b --workdir=runs/7b
python launch/run.py --config=configs/ppo.py:reference --workdir=runs/reference

The preset "reference" has the habits of VLM-RLAIF's released code, for comparison with
it: see docs/design.md. "reference_7b" is the same at 7B.
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.training import ppo

STAGES = ("sft_short", "sft_long", "label", "rm", "ppo", "eval")


def tiny() -> ConfigDict:
  model, data = front.model_tiny(), front.data_tiny()
  config = front.recipe("ppo", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  config.ppo = front.section(
    ppo.default_config(),
    steps=30,
    batch_size=64,
    minibatches=2,
    kl_coef=0.3,
    save_every=10,
    samples_every=5,
    optimizer=dict(learning_rate=5e-4, warmup_steps=4),
  )
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the setting of the paper (2402.03746): one epoch over 99k prompts."""
  model, data = front.model_7b(), front.data_7b()
  config = front.recipe("ppo", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  config.ppo = front.section(
    ppo.default_config(),
    steps=386,
    batch_size=256,
    microbatches=16,
    epochs=2,
    minibatches=2,
    kl_coef=0.1,
    lam=1.0,
    stop_penalty=-8.0,
    length_coef=-10.0,
    save_every=10,
    samples_every=20,
    optimizer=dict(learning_rate=3e-5, warmup_steps=20, schedule="cosine"),
  )
  config.evaluate = front.evaluate_7b()
  return config


def reference(config: ConfigDict) -> ConfigDict:
  """Returns a config with the habits of the released code.

  Scores at the last position, losses and GAE over padding, KL clamped at 0, rewards
  times 10 with an absolute value clip, and the length and stop terms.
  """
  config.ppo.update(
    mask_padding=False,
    kl_estimator="k1_clamped",
    reward_scale=10.0,
    lam=1.0,
    stop_penalty=-8.0,
    length_coef=-10.0,
  )
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  presets = {
    "tiny": tiny,
    "7b": llava_7b,
    "reference": lambda: reference(tiny()),
    "reference_7b": lambda: reference(llava_7b()),
  }
  return front.choose(presets, preset)
