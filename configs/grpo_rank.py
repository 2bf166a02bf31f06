"""Oracle-RLAIF (2510.02561): an oracle orders a group of responses; GRPO on ranks.

python launch/run.py --config=configs/grpo_rank.py --workdir=runs/rank

The oracle is the reward model's order, or --config.grpo.oracle.kind=list|pairs|truth.
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.training import grpo

STAGES = ("sft_short", "sft_long", "label", "rm", "grpo", "eval")


def tiny() -> ConfigDict:
  model, data = front.model_tiny(), front.data_tiny()
  config = front.recipe("grpo_rank", STAGES, model=model, data=data)
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  config.grpo = front.section(
    grpo.default_config(),
    steps=30,
    batch_size=24,  # Prompts; `samples` responses to each.
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
  """Returns the paper's groups of 5 and rollouts of 64; it leaves the rest open.

  As reported: 4 epochs over 99k prompts, each with a reference of its own.
  """
  model, data = front.model_7b(), front.data_7b()
  config = front.recipe("grpo_rank", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  config.grpo = front.section(
    grpo.default_config(),
    steps=6188,
    batch_size=64,
    microbatches=2,  # A group is never divided: 16 prompts at once, on 16 devices.
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
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
