"""Oracle-RLAIF (2510.02561): GRPO on the ranks that an oracle gives a group.

python launch/run.py --config=configs/grpo_rank.py --workdir=runs/rank

The default oracle ranks by the reward model. --config.grpo.oracle.kind=list, pairs or
truth selects another one.
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.training import grpo

STAGES = ("sft_short", "sft_long", "label", "rm", "grpo", "eval")


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("grpo_rank", STAGES, model=model, data=data)
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
    oracle=dict(kind="reward_rank"),
    advantage="oracle_ndcg",
    kl_coef=0.04,
    save_every=10,
    samples_every=5,
    optimizer=dict(learning_rate=5e-4, warmup_steps=4),
  )
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the paper's groups of 5, rollouts of 64 and 4 epochs over 99k prompts.

  Each epoch has its own reference policy. The paper does not state other values.
  """
  model, data = front.model_7b(), front.data_7b()
  config = front.make_recipe("grpo_rank", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  config.reward = front.reward_7b()
  config.grpo = front.make_section(
    grpo.default_config(),
    steps=6188,
    batch_size=64,
    microbatches=2,  # 16 prompts each, on at most 16 devices: groups are not divided.
    samples=5,
    minibatches=2,
    oracle=dict(kind="reward_rank"),
    advantage="oracle_ndcg",
    kl_coef=0.1,
    kl_anchor="epoch_start",
    kl_direction="old_to_new",
    save_every=10,
    samples_every=50,
    optimizer=dict(learning_rate=3e-5, warmup_steps=20, schedule="cosine"),
  )
  config.evaluate = front.evaluate_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
