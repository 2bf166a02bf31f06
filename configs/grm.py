"""A generative reward model by RL (Generative RLHF-V, 2505.18531), beside other judges.

python launch/run.py --config=configs/grm.py --workdir=runs/grm

The last stage holds all judges against truth, on videos like those that they were
taught on and on videos that look unlike them. The paper's preferences are of people:
give a file by --config.rm.preferences. The labels of the stage "label" are those that
the same model gave in both orders, and have little to teach it.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("sft_short", "sft_long", "label", "rm", "grm_sft", "grm", "judges")


def get_config(preset: str = "tiny") -> ConfigDict:
  config = common.recipe("grm", STAGES, preset)
  if preset == "tiny":
    config.data.sizes.shifted = 260
  else:
    paper(config)
  return config


def paper(config: ConfigDict) -> None:
  """The setting of the paper's judge (its table 5), 30k pairs, 2 epochs.

  Its 1e-6 is of all weights; LoRA takes the rate of our other stages. Its mini-batch of
  128 prompts does not divide its batch of 360: three of 120 do. Its score and value
  clips, and its critic, are of PPO. bfloat16 and recomputed layers: as all 7b presets.
  """
  config.grm_sft.update(batch_size=128, microbatches=16, steps=234, save_every=100)
  config.grm_sft.update(prompt_len=4096, max_new=2048)
  config.grm_sft.optimizer.update(
    learning_rate=2e-5, weight_decay=0.01, warmup_steps=7, schedule="cosine"
  )
  config.grm.update(
    batch_size=360,
    minibatches=3,
    microbatches=15,  # Of 8 prompts and all their verdicts, on 8 devices at most.
    steps=167,
    samples=8,
    temperature=1.0,
    kl_coef=0.02,
    clip_eps=0.2,
    prompt_len=12800,
    max_new=2048,
  )
  config.grm.optimizer.update(
    learning_rate=3e-5, weight_decay=0.01, warmup_steps=15, schedule="cosine"
  )
  config.judges.update(prompt_len=12800, max_new=2048)
