"""The pieces that recipes share, and their two sizes: "tiny" and "7b"."""

from ml_collections import ConfigDict

from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.methods import dpo, grpo, ppo, rm, sft
from vlmrlaif_jax.runtime import run
from vlmrlaif_jax.stages.evaluation import benchmarks, evaluate, judges
from vlmrlaif_jax.stages.labeling import claims, pairwise
from vlmrlaif_jax.stages.training import common, oracles

PRESETS = ("tiny", "7b")


def recipe(name: str, stages: tuple[str, ...], preset: str) -> ConfigDict:
  """A recipe: which stages lead to it, and the settings of all of them.

  Args:
    name: of the recipe's file.
    stages: in order; those that are done in the workdir are skipped.
    preset: "tiny", the embedded world on a CPU, or "7b", the paper's setting.
  """
  if preset not in PRESETS:
    raise ValueError(f"preset must be one of {PRESETS}, not {preset!r}")
  config = ConfigDict(
    dict(
      recipe=name,
      preset=preset,
      stages=stages,
      seed=0,
      # -1: what is left of the devices.
      mesh=dict(data=1, fsdp=-1, context=1, tensor=1),
      model=run.default_config(),
      data=pipeline.default_config(),
      sft=sft_stage(),
      label=pairwise.default_config(),
      rm=rm_stage(),
      ppo=ppo_stage(),
      grpo=grpo_stage(),
      grm_sft=grm_sft_stage(),
      grm=grm_stage(),
      judges=judges.default_config(),
      rounds=4,  # Of RLAIF-V; each has its claims and its DPO.
      claims=claims.default_config(),
      dpo=dpo_stage(),
      evaluate=evaluate.default_config(),
      benchmarks=benchmarks.default_config(),
    )
  )
  if preset == "7b":
    paper(config)
  return config


def sft_stage() -> ConfigDict:
  config = common.default_stage(
    **sft.default_config(),
    short_share=0.6,  # Of the records, by length of answer, that the first stage reads.
    threshold=0,  # Longest easy answer, in words; 0: by the share.
    short_steps=50,
    long_steps=50,
    pack_len=256,  # Tokens of a row that several examples share; 0: a row to each.
  )
  config.optimizer.update(learning_rate=1e-3, warmup_steps=5, schedule="cosine")
  return config


def rm_stage() -> ConfigDict:
  config = common.default_stage(
    **rm.default_config(),
    preferences="",  # A file of preferences; "": what the label stage wrote.
    holdout=0.15,  # Of the videos, to measure on.
    measure_every=10,  # Steps between two measures; 0: at the end alone.
    steps=40,
  )
  config.optimizer.update(learning_rate=5e-4, warmup_steps=5, schedule="cosine")
  return config


def ppo_stage() -> ConfigDict:
  config = common.default_stage(
    **ppo.default_config(),
    critic_head="zero",  # Or "reward": the reward model's own.
    steps=30,  # Rollouts.
    epochs=1,  # Passes over each rollout.
    minibatches=2,  # Updates in each pass.
    samples_every=5,  # Steps between two files of samples.
  )
  config.batch_size = 64
  config.save_every = 10
  config.optimizer.update(learning_rate=5e-4, warmup_steps=4)
  config.update(kl_coef=0.3)
  return config


def grpo_stage() -> ConfigDict:
  config = common.default_stage(
    **grpo.default_config(),
    oracle=oracles.default_config(),
    steps=30,  # Rollouts.
    epochs=1,  # Passes over each rollout.
    minibatches=2,  # Updates in each pass.
    samples_every=5,  # Steps between two files of samples.
  )
  config.batch_size = 24  # Prompts; `samples` responses to each.
  config.save_every = 10
  config.optimizer.update(learning_rate=5e-4, warmup_steps=4)
  return config


def dpo_stage() -> ConfigDict:
  config = common.default_stage(
    **dpo.default_config(),
    preferences="",  # A file of preferences; "": those of the stage before.
    select="last",  # Or "claims": see dpo.SELECT.
    steps=40,
  )
  config.batch_size = 16
  config.save_every, config.keep = 10, 4
  config.optimizer.update(learning_rate=3e-4, warmup_steps=4, schedule="cosine")
  return config


def grm_sft_stage() -> ConfigDict:
  config = common.default_stage(
    **sft.default_config(),
    prompt_len=160,  # Tokens of what a judge is asked, video included.
    max_new=16,  # Of what it says.
    steps=20,
    pack_len=0,  # As in sft.
  )
  config.optimizer.update(learning_rate=3e-4, warmup_steps=3, schedule="cosine")
  return config


def grm_stage() -> ConfigDict:
  config = grpo_stage()
  config.update(
    start="grm_sft",  # Or "sft", for a model that says scores in a box untaught.
    prompt_len=160,  # Tokens of what a judge is asked, video included.
    max_new=16,  # Of what it says.
    samples=8,
    rank_adv="grpo_scalar",
    truncated="keep",  # Without scores it has nothing, and that is all.
    kl_coef=0.02,
  )
  config.oracle.kind = "verdict"
  return config


def paper(config: ConfigDict) -> None:
  """The setting of VLM-RLAIF (2402.03746); what it leaves open follows its code."""
  config.model.update(
    path="checkpoints/llava-1.5-7b-hf",
    scorer_path="checkpoints/vlm-sft-13b-hf",
    size="llava_7b",
    scorer_size="llava_13b",
    template="vicuna_v1",
    prompts="paper",
    frames=50,
    clip_frames=20,
    lora_rank=64,
    lora_alpha=16.0,
    dtype="bfloat16",
    remat="full",
    quant="nf4",  # QLoRA, as the paper says; its code does so in PPO alone.
  )
  config.data.update(
    records="data/sft.json",
    videos="data/videos",
    prompts="data/rl.json",
    prompt_len=768,
    response_len=896,
    workers=16,
  )
  # 214k easy and 113k hard records, one epoch each.
  config.sft.update(
    batch_size=128,
    microbatches=8,
    short_share=0.654,
    short_steps=1672,
    long_steps=883,
    pack_len=0,
    save_every=100,
  )
  config.sft.optimizer.update(learning_rate=1e-4, warmup_steps=50, schedule="cosine")
  config.label.update(
    judge_prompt_len=3072,
    judge_max_new=128,
    caption_prompt_len=640,
    caption_max_new=512,
  )
  # As VLM-RLAIF's scripts sample.
  config.benchmarks.update(temperature=0.2, judge_prompt_len=2048, judge_max_new=64)
  rewarded(config)
  successors(config)


def rewarded(config: ConfigDict) -> None:
  """The settings of the reward model and of PPO."""
  config.rm.update(batch_size=16, save_every=400, steps=2400, measure_every=200)
  config.rm.optimizer.update(
    learning_rate=2e-5, warmup_steps=72, schedule="constant", clip_norm=0.3
  )
  # 256 prompts a rollout, two passes of two updates, one epoch over 99k prompts.
  config.ppo.update(
    batch_size=256,
    microbatches=16,
    steps=386,
    epochs=2,
    minibatches=2,
    samples_every=20,
  )
  config.ppo.optimizer.update(learning_rate=3e-5, warmup_steps=20, schedule="cosine")
  config.ppo.update(
    kl_coef=0.1, lam=1.0, value_clip_eps=0.2, stop_penalty=-8.0, length_coef=-10.0
  )


def successors(config: ConfigDict) -> None:
  """The settings of the methods beside PPO, as far as they differ from it."""
  # Oracle-RLAIF (2510.02561): groups of 5, rollouts of 64; the rest it leaves open. A
  # group is never divided: 16 prompts at once, on 16 devices at most.
  config.grpo.update(batch_size=64, microbatches=2, steps=1544, epochs=1)
  config.grpo.samples_every = 50
  config.grpo.optimizer.update(learning_rate=3e-5, warmup_steps=20, schedule="cosine")
  config.grpo.update(samples=5, kl_coef=0.1)
  # RLAIF-V (2405.17220): 10 samples of 4,000 prompts a round, 4 epochs of some 5,300
  # pairs in batches of 8, a checkpoint every quarter of an epoch; its LoRA rates. Its
  # claims are split by a Llama-3-8B and checked by another model than the policy: here
  # by SFT and by what came before it, or by a server.
  config.claims.update(
    prompts=4000,
    splitter="self",
    split_prompt_len=1536,
    split_max_new=512,
    check_len=1536,
    check_rows=8,
  )
  config.dpo.update(batch_size=8, steps=2672, save_every=167, keep=16)
  config.dpo.optimizer.update(
    learning_rate=1e-5, warmup_steps=134, schedule="cosine", weight_decay=0.01
  )
