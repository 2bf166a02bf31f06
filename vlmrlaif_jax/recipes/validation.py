"""Refuses a recipe before anything is computed, with what to do about it.

`used`: the sections of the config that the recipe's stages read; no other counts.
"""

import pathlib
import re
from collections.abc import Set

from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.runtime import role_params, run
from vlmrlaif_jax.stages.evaluation import benchmarks
from vlmrlaif_jax.training import alarms

ROLLOUTS = (
  *role_params.RL,
  "grm",
)  # Sections of stages that sample what they learn from.
TRAINED = ("sft", "rm", "dpo", "grm_sft", *ROLLOUTS)  # Sections of stages that train.


class RecipeError(Exception):
  """A recipe that cannot be run as it is given, and what to do about it."""


def check(config: ConfigDict, used: Set[str]) -> None:
  """All checks of this file.

  Raises:
    RecipeError: the first of them that fails.
  """
  check_paths(config)
  check_benchmarks(config, used)
  check_batches(config, used)
  check_mesh(config, used)
  check_schedules(config, used)
  check_alarms(config, used)


def check_paths(config: ConfigDict) -> None:
  """Refuses a config that names files that are not there, all of them at once."""
  wanted = [
    (
      "model.path",
      "a LLaVA checkpoint in Hugging Face's form: config.json, "
      "*.safetensors and the tokenizer's files",
    ),
    ("data.records", "a LLaVA-style .json or .jsonl file to fine-tune on"),
    ("data.videos", "the folder that the videos in the records are named from"),
    ("data.prompts", "a file of the same form with the questions for RL"),
    ("data.benchmark", "a file of the same form to measure on"),
    ("rm.preferences", "a file of preferences, see docs/data.md"),
    ("dpo.preferences", "a file of preferences, see docs/data.md"),
  ]
  if run.own_scorer(config):
    wanted.insert(1, ("model.scorer_path", "the same, for reward model and critic"))
  missing = []
  for key, what in wanted:
    section, name = key.split(".")
    path = config[section][name]
    if path and not path.startswith(run.BUILTIN) and not pathlib.Path(path).exists():
      missing.append(f"  --config.{key}={path}\n      put there {what}")
  if missing:
    raise RecipeError(
      "these paths are missing:\n"
      + "\n".join(missing)
      + "\nPut the files there, or give the paths that you have by these flags."
    )


def check_benchmarks(config: ConfigDict, used: Set[str]) -> None:
  """Refuses benchmarks whose files are not there, or not of their layout."""
  if "benchmarks" in used:
    try:
      benchmarks.check(config)
    except ValueError as error:
      raise RecipeError(str(error)) from error


def check_batches(config: ConfigDict, used: Set[str]) -> None:
  """Refuses batches of the recipe that their parts or the mesh cannot divide."""
  try:
    shards = sharding.row_shards(sharding.make_mesh(**config.mesh))
  except ValueError as error:
    raise RecipeError(f"{error}; see --config.mesh") from error
  wrong = [
    f"  --config.{key}: {rows} rows in {parts} parts over {shards} devices of the mesh "
    f"(data x fsdp); {rows} must be a multiple of {parts * shards}"
    for key, (rows, parts) in _batch_parts(config).items()
    if key.split(".")[0] in used and rows % (parts * shards)
  ]
  # Prompts are spread over the mesh before there are `samples` rows of each.
  if "ppo" in used and config.ppo.batch_size % shards:
    wrong.append(
      f"  --config.ppo.batch_size: {config.ppo.batch_size} prompts over {shards} "
      "devices of the mesh (data x fsdp)"
    )
  if wrong:
    raise RecipeError(
      "batches that do not divide:\n"
      + "\n".join(wrong)
      + "\nChange the size, or give more of the devices to --config.mesh.tensor."
    )
  if config.rm.microbatches > 1 and config.rm.centre_coef:
    raise RecipeError(
      f"rm.centre_coef={config.rm.centre_coef} speaks of the mean of a "
      f"whole batch, which {config.rm.microbatches} microbatches do not have: set one "
      "of --config.rm.centre_coef=0 and --config.rm.microbatches=1"
    )


def _batch_parts(config: ConfigDict) -> dict[str, tuple[int, int]]:
  """(rows of each batch, in how many parts they are used), by its setting."""
  return {
    "sft.batch_size": (config.sft.batch_size, config.sft.microbatches),
    "rm.batch_size": (config.rm.batch_size, config.rm.microbatches),
    "grm_sft.batch_size": (config.grm_sft.batch_size, config.grm_sft.microbatches),
    "dpo.batch_size": (config.dpo.batch_size, config.dpo.microbatches),
    "claims.batch": (config.claims.batch, 1),
    **{
      f"{name}.batch_size": (
        # A row of PPO is a response, one of GRPO all that were sampled for a prompt.
        config[name].batch_size * (config[name].samples if name == "ppo" else 1),
        config[name].minibatches * config[name].microbatches,
      )
      for name in ROLLOUTS
    },
    "label.batch": (config.label.batch, 1),
    "evaluate.batch": (config.evaluate.batch, 1),
    "judges.batch": (config.judges.batch, 1),
    "benchmarks.batch": (config.benchmarks.batch, 1),
  }


def check_mesh(config: ConfigDict, used: Set[str]) -> None:
  """Refuses what the mesh's context and tensor cannot divide.

  Prompts that are only read, and the reward prompt behind an answer, may have any
  length: models pad them. Of what is trained on, log-probabilities are made as well.
  """
  shape = sharding.make_mesh(**config.mesh).shape
  _check_heads(config, shape["tensor"])
  context = shape["context"]
  if context > 1 and config.model.attention == "cudnn":
    raise RecipeError(
      f"model.attention=cudnn does not work on parts of rows, of mesh.context={context}"
      ": set --config.model.attention=xla, or --config.mesh.context=1"
    )
  policies, raters = ("sft", "ppo", "grpo", "dpo"), ("grm_sft", "grm")
  lengths = {f"{name}.chunk": config[name].chunk for name in (*policies, *raters)}
  for name in policies:
    whole = config.data.prompt_len + config.data.response_len
    lengths[f"{name}: data.prompt_len + data.response_len"] = whole
  for name in raters:
    whole = config[name].prompt_len + config[name].max_new
    lengths[f"{name}.prompt_len + {name}.max_new"] = whole
  wrong = [
    f"  {what} is {length}, to be {-(-length // context) * context}"
    for what, length in lengths.items()
    if re.match(r"\w+", what)[0] in used and length % context
  ]
  if wrong:
    raise RecipeError(
      f"tokens that mesh.context={context} devices do not divide:\n"
      + "\n".join(wrong)
      + "\nRaise these lengths, or set --config.mesh.context=1."
    )


def _check_heads(config: ConfigDict, tensor: int) -> None:
  """Refuses a kernel that cannot have heads of its own on each device."""
  model = config.model
  if model.attention != "splash":
    return
  paths = [model.path, model.scorer_path] if run.own_scorer(config) else [model.path]
  for path in paths:
    file = run.resolve(path) / "config.json"
    if not file.exists():  # An adapter has its base's.
      continue
    told = read_json(file)
    told = told.get("text_config", told)
    # Some leave them to be known; those are found when it is read.
    heads = told.get("num_key_value_heads", told.get("num_attention_heads", 0))
    if heads % tensor:
      raise RecipeError(
        f"{path} has {heads} key and value heads, which mesh.tensor={tensor} does not "
        "divide, as splash wants: give another --config.mesh.tensor, or "
        "--config.model.attention=xla"
      )


def check_schedules(config: ConfigDict, used: Set[str]) -> None:
  """Refuses a warm-up that lasts as long as the training it is of."""
  rollouts = lambda part: part.steps * part.epochs * part.minibatches
  updates = {
    "sft": min(config.sft.short_steps, config.sft.long_steps),
    "rm": config.rm.steps,
    "dpo": config.dpo.steps,
    "grm_sft": config.grm_sft.steps,
    **{name: rollouts(config[name]) for name in ROLLOUTS},
  }
  wrong = [
    f"  --config.{section}.optimizer.warmup_steps="
    f"{config[section].optimizer.warmup_steps}, of {count} updates"
    for section, count in updates.items()
    if section in used and config[section].optimizer.warmup_steps >= count
  ]
  if wrong:
    raise RecipeError(
      "warm-ups that never end:\n"
      + "\n".join(wrong)
      + "\nLower them, or take more steps."
    )


def check_alarms(config: ConfigDict, used: Set[str]) -> None:
  """Refuses alarms that there are not."""
  for section in sorted(used & set(TRAINED)):
    try:
      alarms.check(config[section].alarms)
    except ValueError as error:
      raise RecipeError(f"--config.{section}.{error}") from error
