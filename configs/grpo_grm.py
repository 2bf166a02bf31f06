"""GRPO on the scores of a generative reward model that compares responses (2505.18531).

python launch/run.py --config=configs/grpo_grm.py --workdir=runs/grpo_grm

The judge of the stage "grm" compares all pairs of responses to a prompt, in both
orders. --config.grpo.oracle.grm_stage=grm_sft selects the judge before RL, and sft the
policy without training as a judge.
"""

from ml_collections import ConfigDict

from configs import front, grm
from vlmrlaif_jax.stages.training import grpo

STAGES = ("sft_short", "sft_long", "label", "grm_sft", "grm", "grpo", "eval")


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("grpo_grm", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()  # The judge reads `preferences` and `holdout`.
  config.grm_sft = grm.grm_sft_tiny()
  config.grm = grm.grm_tiny()
  config.grpo = front.make_section(
    grpo.default_config(),
    steps=30,
    batch_size=24,
    samples=5,
    minibatches=2,
    oracle=dict(kind="grm", prompt_len=160, max_new=16),
    advantage="grpo_scalar",
    truncated_responses="keep",
    kl_coef=0.1,  # With the paper's 0.02, the small policy diverges in 1 of 3 seeds.
    save_every=10,
    samples_every=5,
    optimizer=dict(learning_rate=5e-4, warmup_steps=4),
  )
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the values of the paper's policy (its table 5): 30k prompts, 2 epochs.

  The remarks about the judge in configs/grm.py apply here, too.
  """
  model, data = front.model_7b(), front.data_7b()
  config = front.make_recipe("grpo_grm", STAGES, model=model, data=data)
  config.data.update(prompt_len=4096, response_len=512)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()  # The judge reads `preferences` and `holdout`.
  config.grm_sft = grm.grm_sft_7b()
  config.grm = grm.grm_7b()
  config.grpo = front.make_section(
    grpo.default_config(),
    steps=167,
    batch_size=360,
    minibatches=3,
    microbatches=15,  # 8 prompts with all responses each, on at most 8 devices.
    samples=5,
    oracle=dict(kind="grm", prompt_len=12800, max_new=2048),
    advantage="grpo_scalar",
    truncated_responses="keep",
    kl_coef=0.02,
    save_every=10,
    samples_every=50,
    optimizer=dict(
      learning_rate=3e-5, weight_decay=0.01, warmup_steps=15, schedule="cosine"
    ),
  )
  config.evaluate = front.evaluate_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
