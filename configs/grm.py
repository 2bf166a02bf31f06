"""A generative reward model by RL (Generative RLHF-V, 2505.18531), beside other judges.

python launch/run.py --config=configs/grm.py --workdir=runs/grm

The last stage holds all judges against truth, on videos like those that they were
taught on and on videos that look unlike them. The paper's preferences are of people:
give a file by --config.rm.preferences. The labels of the stage "label" are those that
the same model gave in both orders, and have little to teach it.
"""

from ml_collections import ConfigDict

from configs import front
from vlmrlaif_jax.stages.evaluation import judges
from vlmrlaif_jax.stages.training import generative_rm

STAGES = ("sft_short", "sft_long", "label", "rm", "grm_sft", "grm", "judges")


def tiny() -> ConfigDict:
  model, data = front.model_tiny(), front.data_tiny()
  config = front.recipe("grm", STAGES, model=model, data=data)
  config.data.sizes.shifted = 260
  config.sft = front.sft_tiny()
  config.label = front.label_tiny()
  config.rm = front.rm_tiny()
  config.grm_sft = grm_sft_tiny()
  config.grm = grm_tiny()
  config.judges = front.section(judges.default_config(), prompt_len=160, max_new=16)
  return config


def grm_sft_tiny() -> ConfigDict:
  return front.section(
    generative_rm.get_grm_sft_config(),
    steps=20,
    batch_size=32,
    prompt_len=160,
    max_new=16,
    save_every=50,
    optimizer=dict(learning_rate=3e-4, warmup_steps=3, schedule="cosine"),
  )


def grm_tiny() -> ConfigDict:
  return front.section(
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
  """Returns the setting of the paper's judge (its table 5): 30k pairs, 2 epochs.

  Its 1e-6 is of all weights; LoRA takes the rate of our other stages. Its mini-batch of
  128 prompts does not divide its batch of 360: three of 120 do. Its score and value
  clips, and its critic, are of PPO. bfloat16 and recomputed layers: as all 7b presets.
  """
  model, data = front.model_7b(), front.data_7b()
  config = front.recipe("grm", STAGES, model=model, data=data)
  config.sft = front.sft_7b()
  config.label = front.label_7b()
  config.rm = front.rm_7b()
  config.grm_sft = grm_sft_7b()
  config.grm = grm_7b()
  config.judges = front.section(judges.default_config(), prompt_len=12800, max_new=2048)
  return config


def grm_sft_7b() -> ConfigDict:
  return front.section(
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
  return front.section(
    generative_rm.get_grm_config(),
    steps=167,
    batch_size=360,
    minibatches=3,
    microbatches=15,  # Of 8 prompts and all their verdicts, on 8 devices at most.
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
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
