"""The sections that recipes share: model, data, SFT, labels, reward model, evaluation.

Each has its values for the two sizes of a recipe. "tiny" is the embedded world, which
takes minutes on a CPU. "7b" is the setting of VLM-RLAIF (2402.03746); what the paper
leaves open follows its code.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.core.files import flatten_settings
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.data.world import language
from vlmrlaif_jax.runtime import run
from vlmrlaif_jax.stages.evaluation import evaluate
from vlmrlaif_jax.stages.labeling import pairwise
from vlmrlaif_jax.stages.training import rm, sft


def choose(presets: Mapping[str, Callable[[], ConfigDict]], preset: str) -> ConfigDict:
  """Returns the config of a preset.

  Raises:
    ValueError: the recipe has no preset of this name.
  """
  if preset not in presets:
    raise ValueError(f"preset must be one of {tuple(presets)}, not {preset!r}")
  config = presets[preset]()
  config.preset = preset
  return config


def section(defaults: ConfigDict, **values: Any) -> ConfigDict:
  """Returns a section: the defaults of its owner, and a recipe's values.

  Args:
    defaults: see the `default_config` of stages and components.
    values: by name; a dict for settings below a name.

  Raises:
    KeyError: a value is for a setting that does not exist.
    TypeError: a value has another type than its setting.
    ValueError: a setting without a default has no value.
  """
  defaults.lock()  # Unknown names are then errors.
  defaults.update(values)
  config = defaults.copy_and_resolve_references().unlock()
  missing = [
    key for key, value in flatten_settings(config.to_dict()).items() if value is None
  ]
  if missing:
    raise ValueError(f"a recipe must set {', '.join(missing)}")
  return config


def recipe(
  name: str, stages: tuple[str, ...], *, model: ConfigDict, data: ConfigDict
) -> ConfigDict:
  """Returns what every recipe has, without the sections of its stages.

  Args:
    name: of the recipe's file.
    stages: in order; those that are done in the workdir are skipped.
    model: the section `model`.
    data: the section `data`.
  """
  return ConfigDict(
    dict(
      recipe=name,  # Name of the recipe's file; do not change it.
      preset="",  # Preset of the recipe, after the ":" of --config.
      stages=stages,  # Stages in order; those that are done are skipped.
      seed=0,  # Seed of all random numbers.
      mesh=dict(  # A size of -1 takes the devices that the others leave.
        data=1,  # Copies of the weights, which divide the rows of a batch.
        fsdp=-1,  # Parts of the weights, which also divide the rows of a batch.
        context=1,  # Parts of each row of tokens.
        tensor=1,  # Parts of the attention heads and of the MLP's columns.
      ),
      model=model,
      data=data,
    )
  )


def model_tiny() -> ConfigDict:
  """Returns the base model that the package ships."""
  return section(
    run.default_config(),
    path="builtin:tiny",
    template="brief",
    prompts="brief",
    frames=12,
    clip_frames=4,
    lora_rank=16,
    lora_alpha=32.0,
  )


def model_7b() -> ConfigDict:
  """Returns LLaVA-1.5 7B, and 13B for the reward model and the critic."""
  return section(
    run.default_config(),
    path="checkpoints/llava-1.5-7b-hf",
    reward_model_path="checkpoints/vlm-sft-13b-hf",
    size="llava_7b",
    reward_model_size="llava_13b",
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


def data_tiny() -> ConfigDict:
  """Returns the embedded world."""
  return section(pipeline.default_config(), prompt_len=56, response_len=48)


def data_7b() -> ConfigDict:
  """Returns files of the user's own."""
  return section(
    pipeline.default_config(),
    records="data/sft.json",
    videos="data/videos",
    prompts="data/rl.json",
    prompt_len=768,
    response_len=896,
    workers=16,
  )


def sft_tiny() -> ConfigDict:
  return section(
    sft.default_config(),
    short_share=0.6,
    short_steps=50,
    long_steps=50,
    batch_size=32,
    pack_len=256,
    save_every=50,
    optimizer=dict(learning_rate=1e-3, warmup_steps=5, schedule="cosine"),
  )


def sft_7b() -> ConfigDict:
  """Returns one epoch each of 214k easy and 113k hard records."""
  return section(
    sft.default_config(),
    short_share=0.654,
    short_steps=1672,
    long_steps=883,
    batch_size=128,
    microbatches=8,
    pack_len=0,
    save_every=100,
    optimizer=dict(learning_rate=1e-4, warmup_steps=50, schedule="cosine"),
  )


def label_tiny() -> ConfigDict:
  return section(
    pairwise.default_config(),
    judge_prompt_len=256,
    judge_max_new=12,
    caption_prompt_len=40,
    caption_max_new=48,
  )


def label_7b() -> ConfigDict:
  return section(
    pairwise.default_config(),
    judge_prompt_len=3072,
    judge_max_new=128,
    caption_prompt_len=640,
    caption_max_new=512,
  )


def rm_tiny() -> ConfigDict:
  return section(
    rm.default_config(),
    steps=40,
    batch_size=32,
    save_every=50,
    measure_every=10,
    optimizer=dict(learning_rate=5e-4, warmup_steps=5, schedule="cosine"),
  )


def rm_7b() -> ConfigDict:
  return section(
    rm.default_config(),
    steps=2400,
    batch_size=16,
    save_every=400,
    measure_every=200,
    optimizer=dict(learning_rate=2e-5, warmup_steps=72, clip_norm=0.3),
  )


def evaluate_tiny() -> ConfigDict:
  """Returns the held-out questions, and how benchmarks of the world are judged."""
  return section(
    evaluate.default_config(),
    prompt_len=160,
    judge="exact",
    judge_prompt_len=768,
    judge_max_new=32,
    similarity="statements",
    multiple_choice=dict(by=("letter", "text", "generation")),
    # In words that the small policies know.
    retrieval=dict(question=language.DESCRIBE_EVENTS),
    action=dict(question=language.DESCRIBE_EVENTS),
  )


def evaluate_7b() -> ConfigDict:
  """Returns the held-out questions, sampled as VLM-RLAIF's scripts do."""
  return section(evaluate.default_config(), temperature=0.2)
