"""A generative reward model, trained by RL (Generative RLHF-V, 2505.18531).

python launch/run.py --config=configs/grm.py --workdir=runs/grm

The last stage compares all judges with the ground truth, on videos like those of their
training and on videos that look different. The paper uses preferences of people: pass a
file with --config.rm.preferences. The default labels, on which the same model agrees in
both orders, contain little that the model can learn.
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.evaluation import judges
from vlmrlaif_jax.stages.training import generative_rm

STAGES = ("sft_short", "sft_long", "label", "rm", "grm_sft", "grm", "judges")


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("grm", STAGES, model=model, data=data)
  config.data.sizes.shifted = 260
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  config.grm_sft = grm_sft_tiny()
  config.grm = grm_tiny()
  config.judges = front.make_section(
    judges.default_config(), prompt_len=160, max_new=16
  )
  return config


def grm_sft_tiny() -> ConfigDict:
  """Returns the section `grm_sft` of the preset tiny."""
  return front.make_section(
    generative_rm.get_grm_sft_config(),
    steps=20,
    batch_size=32,
    prompt_len=160,
    max_new=16,
    save_every=50,
    optimizer=dict(learning_rate=3e-4, warmup_steps=3, schedule="cosine"),
  )


def grm_tiny() -> ConfigDict:
  """Returns the section `grm` of the preset tiny."""
  return front.make_section(
    generative_rm.get_grm_config(),
    steps=30,
    batch_size=24,
    samples=8,
    minibatches=2,
    advantage="grpo_scalar",
    kl_coef=0.02,
    prompt_len=160,
    max_new=16,
    save_every=10,
    samples_every=5,
    optimizer=dict(learning_rate=5e-4, warmup_steps=4),
  )


def llava_7b() -> ConfigDict:
  """Returns the values of the paper's judge (its table 5): 30k pairs, 2 epochs.

  The paper's learning rate of 1e-6 is for all weights; LoRA uses the rate of the other
  stages. The paper's minibatch of 128 prompts does not divide its batch of 360, so this
  preset uses three of 120. The paper's score clip, value clip and critic belong to PPO.
  """
  model, data = front.model_7b(), front.data_7b()
  config = front.make_recipe("grm", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  config.grm_sft = grm_sft_7b()
  config.grm = grm_7b()
  config.judges = front.make_section(
    judges.default_config(), prompt_len=12800, max_new=2048
  )
  return config


def grm_sft_7b() -> ConfigDict:
  """Returns the section `grm_sft` of the preset 7b."""
  return front.make_section(
    generative_rm.get_grm_sft_config(),
    steps=234,
    batch_size=128,
    microbatches=16,
    prompt_len=4096,
    max_new=2048,
    save_every=100,
    optimizer=dict(
      learning_rate=2e-5, weight_decay=0.01, warmup_steps=7, schedule="cosine"
    ),
  )


def grm_7b() -> ConfigDict:
  """Returns the section `grm` of the preset 7b."""
  return front.make_section(
    generative_rm.get_grm_config(),
    steps=167,
    batch_size=360,
    minibatches=3,
    microbatches=15,  # 8 prompts with all verdicts each, on at most 8 devices.
    samples=8,
    advantage="grpo_scalar",
    kl_coef=0.02,
    prompt_len=12800,
    max_new=2048,
    save_every=10,
    samples_every=5,
    optimizer=dict(
      learning_rate=3e-5, weight_decay=0.01, warmup_steps=15, schedule="cosine"
    ),
  )


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
