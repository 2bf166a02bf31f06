"""Sections that recipes share: model, data, SFT, labels, reward model, evaluation.

Each section has values for the two presets of a recipe. "tiny" uses the embedded world
and takes minutes on a CPU. "7b" has the values of VLM-RLAIF (2402.03746), or of its
code for values that the paper does not state. published.py derives other presets.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.published import DERIVED, derive_preset
from vlmrlaif_jax.core.files import flatten_settings
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.data.world import language
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.terms import scorer
from vlmrlaif_jax.runtime import run
from vlmrlaif_jax.stages.evaluation import evaluate
from vlmrlaif_jax.stages.labeling import pairwise
from vlmrlaif_jax.stages.training import rm, sft


def choose_preset(
  presets: Mapping[str, Callable[[], ConfigDict]], preset: str
) -> ConfigDict:
  """Returns the config of a preset.

  Args:
    presets: The recipe's own presets, "tiny" and "7b" among them, from which those of
      other families are derived.
    preset: Name of the preset.

  Raises:
    ValueError: The recipe has no preset of this name.
  """
  derived = {name: functools.partial(derive_preset, presets, name) for name in DERIVED}
  presets = {**presets, **derived}
  if preset not in presets:
    raise ValueError(f"preset must be one of {tuple(presets)}, not {preset!r}")
  config = presets[preset]()
  config.preset = preset
  return share_judge(config)


def share_judge(config: ConfigDict) -> ConfigDict:
  """Adds the section `judge`, whose values all servers of judges have by default.

  A setting of a subsection `endpoint` follows the setting of `judge` until it has a
  value of its own. A value that a recipe sets stays.

  Args:
    config: A recipe with its sections, which is changed. Without a subsection
      `endpoint`, nothing is added.
  """
  defaults, servers = endpoint.default_config(), list(_find_endpoints(config))
  if servers and "judge" not in config:
    config.judge = endpoint.default_config()
  for server in servers:
    for name, value in defaults.items():
      if server[name] == value:
        server[name] = config.judge.get_oneway_ref(name)
  return config


def _find_endpoints(section: ConfigDict) -> Iterator[ConfigDict]:
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      yield from [value] if name == "endpoint" else _find_endpoints(value)


def make_section(defaults: ConfigDict, **values: Any) -> ConfigDict:
  """Returns a section with a recipe's values in place of the defaults.

  Args:
    defaults: Result of the `default_config` of a stage or component.
    **values: Values by name; a dict sets values of a subsection.

  Raises:
    KeyError: A value is for a setting that does not exist.
    TypeError: The type of a value differs from that of its setting.
    ValueError: A setting without a default has no value.
  """
  defaults.lock()  # Unknown names become errors.
  defaults.update(values)
  config = defaults.copy_and_resolve_references().unlock()
  missing = [
    key for key, value in flatten_settings(config.to_dict()).items() if value is None
  ]
  if missing:
    raise ValueError(f"a recipe must set {', '.join(missing)}")
  return config


def make_recipe(
  name: str, stages: tuple[str, ...], *, model: ConfigDict, data: ConfigDict
) -> ConfigDict:
  """Returns a recipe without the sections of its stages.

  Args:
    name: Name of the recipe's file, without the suffix.
    stages: Stages in order. Those that are done in the workdir are skipped.
    model: The section `model`.
    data: The section `data`.
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
  return make_section(
    run.default_config(),
    path="builtin:tiny",
    template="brief",
    prompts="brief",
    frames=12,
    clip_frames=4,
    lora_rank=16,
    lora_alpha=32.0,
    sft_lora_rank=16,
    sft_lora_alpha=32.0,
  )


def model_7b() -> ConfigDict:
  """Returns LLaVA-1.5 7B, with 13B for the reward model and the critic."""
  return make_section(
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
    sft_lora_rank=32,
    sft_lora_alpha=32.0,
    dtype="bfloat16",
    remat="full",
    quant="nf4",  # QLoRA, as in the paper; its code uses QLoRA in PPO only.
  )


def data_tiny() -> ConfigDict:
  """Returns the section `data` for the embedded world."""
  return make_section(pipeline.default_config(), prompt_len=56, response_len=48)


def data_7b() -> ConfigDict:
  """Returns the section `data` for the user's own files."""
  return make_section(
    pipeline.default_config(),
    records="data/sft.json",
    videos="data/videos",
    prompts="data/rl.json",
    max_label_prompts=40_000,
    max_prompts=100_000,
    prompt_len=768,
    response_len=896,
    workers=16,
  )


def sft_tiny() -> ConfigDict:
  """Returns the section `sft` of the preset tiny."""
  return make_section(
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
  """Returns the section `sft` for an epoch of 214k easy and 113k hard records."""
  return make_section(
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
  """Returns the section `label` of the preset tiny."""
  return make_section(
    pairwise.default_config(),
    judge_prompt_len=256,
    judge_max_new=12,
    caption_prompt_len=40,
    caption_max_new=48,
  )


def label_7b() -> ConfigDict:
  """Returns the section `label` of the preset 7b."""
  return make_section(
    pairwise.default_config(),
    judge_prompt_len=3072,
    judge_max_new=128,
    caption_prompt_len=640,
    caption_max_new=512,
  )


def rm_tiny() -> ConfigDict:
  """Returns the section `rm` of the preset tiny."""
  return make_section(
    rm.default_config(),
    steps=40,
    batch_size=32,
    save_every=50,
    measure_every=10,
    optimizer=dict(learning_rate=5e-4, warmup_steps=5, schedule="cosine"),
  )


def rm_7b() -> ConfigDict:
  """Returns the section `rm` of the preset 7b."""
  return make_section(
    rm.default_config(),
    steps=2400,
    batch_size=16,
    save_every=400,
    measure_every=200,
    optimizer=dict(learning_rate=2e-5, warmup_steps=72, clip_norm=0.3),
  )


def reward_tiny() -> ConfigDict:
  """Returns the section `reward` of the preset tiny: the reward model and a rule."""
  return make_section(
    scorer.default_config(), self_judge=dict(prompt_len=512, max_new=96)
  )


def reward_7b() -> ConfigDict:
  """Returns the section `reward` of the preset 7b: the reward model and a rule."""
  return make_section(
    scorer.default_config(), self_judge=dict(prompt_len=6144, max_new=512)
  )


def evaluate_tiny() -> ConfigDict:
  """Returns the section `evaluate` for the embedded world, with its exact judge."""
  return make_section(
    evaluate.default_config(),
    prompt_len=160,
    judge="exact",
    judge_prompt_len=768,
    judge_max_new=32,
    similarity="statements",
    multiple_choice=dict(by=("letter", "text", "generation")),
    # The small policies are trained on this question.
    retrieval=dict(question=language.DESCRIBE_EVENTS),
    action=dict(question=language.DESCRIBE_EVENTS),
  )


def evaluate_7b() -> ConfigDict:
  """Returns the section `evaluate` with the temperature of VLM-RLAIF's scripts."""
  return make_section(evaluate.default_config(), temperature=0.2)
