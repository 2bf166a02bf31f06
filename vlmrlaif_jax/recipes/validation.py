"""Checks of a recipe before anything is computed.

`check_recipe` is the main function. Each stage checks its own settings
(stages/stage.py). This module adds the checks of every recipe: paths, the mesh, and the
division of batches and lengths by the mesh.
"""

import itertools
import os
import pathlib
from collections.abc import Collection, Iterable

from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.stages.stage import Stage, get_stage, load_stages

# Renamed settings, or sections with all their settings: old name -> new name.
RENAMED = {
  "benchmarks": "evaluate",
  **{
    f"{section}.{old}": f"{section}.{new}"
    for section in ("grpo", "grm")
    for old, new in (
      ("aggregate", "loss_aggregation"),
      ("drop_tied", "drop_uniform_groups"),
      ("kl_dir", "kl_direction"),
      ("policy_rank", "policy_logps_reduction"),
      ("rank_adv", "advantage"),
      ("truncated", "truncated_responses"),
    )
  },
  **{
    f"{section}.{old}": f"reward.terms.{new}.weight"
    for section in ("ppo", "grpo.oracle")
    for old, new in (("stop_penalty", "stop"), ("length_coef", "length"))
  },
  **{
    f"{section}.{old}": f"{section}.rollout.max_staleness"
    for section in ("ppo", "grpo", "grm")
    for old in ("async_rollouts", "one_step_off")
  },
  "evaluate.bon_by": "evaluate.held_out.bon_reward",
  "evaluate.held_out.bon_by": "evaluate.held_out.bon_reward",
  "evaluate.judge_sees": "evaluate.judge_sees_video",
  "evaluate.likeness": "evaluate.similarity",
  "model.scorer_path": "model.reward_model_path",
  "model.scorer_size": "model.reward_model_size",
  "evaluate.best_of": "evaluate.held_out.best_of",
  "evaluate.bon_temperature": "evaluate.held_out.bon_temperature",
}
RENAMED_STAGES = {"benchmarks": "eval"}
# Orbax uses the path of a checkpoint as a pattern of glob when it merges arrays.
PATTERN_CHARACTERS = "*?[\\"
# Placeholder in a recipe's stages for "claims_N" and "dpo_N" of each round N.
ROUND_STAGE = "round"


def check_no_links(root: pathlib.Path, stages: Collection[str]) -> None:
  """Checks that the stages of a run write and remove nothing through links.

  A workdir of others may have links to files of the user. Folders that stages only read
  may be links: a finished stage of another run, the world, or features.

  Raises:
    UserError: A file of the workdir is a link, or a folder of an unfinished stage is,
      or has one.
  """
  is_done = lambda path: path.name not in stages or (path / "done.json").exists()
  links = [path for path in root.glob("*") if path.is_symlink()]
  wrong = [path for path in links if not (path.is_dir() and is_done(path))]
  for stage in {*stages} - {path.name for path in links}:
    for folder, *names in os.walk(root / stage):
      paths = (pathlib.Path(folder, name) for name in itertools.chain(*names))
      wrong += [path for path in paths if path.is_symlink()]
  if wrong:
    raise UserError(
      f"{wrong[0]} is a link to {wrong[0].readlink()}: a run would write or remove "
      "files there. Remove it, or copy the file or folder to its place."
    )


def check_workdir_path(root: pathlib.Path) -> None:
  """Checks that checkpoints can be saved and restored below a path.

  Args:
    root: Absolute path of the workdir.

  Raises:
    UserError: The path has a character of a pattern, or is not UTF-8.
  """
  wrong = [each for each in PATTERN_CHARACTERS if each in str(root)]
  if wrong:
    raise UserError(
      f"--workdir={root} has the character {wrong[0]!r}, which Orbax reads as a "
      "pattern, so that no checkpoint could be restored: use a path without "
      f"{' '.join(PATTERN_CHARACTERS)}"
    )
  try:
    str(root).encode()
  except UnicodeEncodeError:
    raise UserError(
      f"--workdir={str(root)!r} is not UTF-8: use a path of valid characters"
    ) from None


def list_stages(config: ConfigDict) -> list[str]:
  """Returns the names of a recipe's stages, with ROUND_STAGE expanded.

  Stages that are not needed are left out; see Stage.is_needed.

  Raises:
    UserError: The recipe names a stage that does not exist.
  """
  names: list[str] = []
  for stage in config.stages:
    if stage in RENAMED_STAGES:
      now = RENAMED_STAGES[stage]
      raise UserError(f"--config.stages: the stage {stage!r} is now {now!r}")
    if stage != ROUND_STAGE and stage not in load_stages():
      known = ", ".join((*load_stages(), ROUND_STAGE))
      raise UserError(f"--config.stages must be of {known}, not {stage!r}")
    names += _list_round_stages(config) if stage == ROUND_STAGE else [stage]
  return [name for name in names if get_stage(name).is_needed(config)]


def _list_round_stages(config: ConfigDict) -> list[str]:
  numbers = range(1, config.rounds + 1)
  stages = [stage for stage in load_stages().values() if stage.in_rounds]
  stages.sort(key=lambda stage: stage.trains_policy)  # A round labels, then trains.
  return [f"{stage.name}_{number}" for number in numbers for stage in stages]


def check_recipe(config: ConfigDict) -> None:
  """Checks all settings that the stages of a recipe read.

  Raises:
    UserError: A setting is wrong. The message has its flag, value and remedy.
  """
  kinds = dict.fromkeys(split_round(name)[0] for name in list_stages(config))
  stages = [get_stage(kind) for kind in kinds]
  check_sections(config, stages)
  check_paths(config)
  run_lib.check(config)
  pipeline.check(config.data)
  for stage in stages:
    stage.check_settings(config)
  check_batches(config, stages)
  check_mesh(config, stages)


def check_sections(config: ConfigDict, stages: Iterable[Stage]) -> None:
  """Checks that a recipe has every section that its stages read.

  Raises:
    UserError: A section is missing or has an old name.
  """
  for key in set(RENAMED) & set(config):
    raise UserError(f"--config.{key}: the section {key!r} is now {RENAMED[key]!r}")
  for stage in stages:
    for section in (stage.section, *stage.reads(config)):
      if section not in config:
        raise UserError(
          f"recipe {config.recipe!r} has no section {section!r}, which stage "
          f"{stage.name!r} reads: use a recipe that has it, or add "
          f"config.{section} to your recipe"
        )


def get_new_name(key: str) -> str | None:
  """Returns the new dotted name of a renamed setting, None for other settings."""
  for old, new in RENAMED.items():
    if key == old or key.startswith(f"{old}."):
      return new + key.removeprefix(old)
  return None


def check_paths(config: ConfigDict) -> None:
  """Checks that all files and folders of the config exist.

  Raises:
    UserError: Paths are missing. The message lists all of them with their content.
  """
  required = [
    (
      "model.path",
      "a LLaVA checkpoint in Hugging Face format: config.json, "
      "*.safetensors and the tokenizer's files",
    ),
    ("data.records", "a .json, .jsonl or .parquet file with records for SFT"),
    ("data.videos", "the folder of the videos that the records name"),
    ("data.prompts", "a file of the same format with the prompts for RL"),
    ("data.label_prompts", "a file of the same format with the prompts for labels"),
    ("data.benchmark", "a file of the same format for evaluation"),
  ]
  for stage in load_stages().values():
    required += [(f"{stage.section}.{key}", what) for key, what in stage.files.items()]
  if run_lib.has_separate_reward_model(config):
    required.insert(
      1, ("model.reward_model_path", "the same, for reward model and critic")
    )
  missing = []
  for key, what in required:
    section, name = key.split(".")
    path = config[section][name] if section in config else ""
    builtin = path.startswith(run_lib.BUILTIN)
    if path and not builtin and not pathlib.Path(path).exists():
      missing.append(f"  --config.{key}={path}\n      expected: {what}")
  if missing:
    raise UserError(
      "these paths are missing:\n"
      + "\n".join(missing)
      + "\nPut the files there, or set these flags to your own paths."
    )


def check_batches(config: ConfigDict, stages: Iterable[Stage]) -> None:
  """Checks that the mesh and the microbatches divide every batch.

  Raises:
    UserError: A batch does not divide. The message lists all of them.
  """
  try:
    shards = sharding.num_batch_shards(sharding.make_mesh(**config.mesh))
  except ValueError as error:
    raise UserError(f"{error}; see --config.mesh") from error
  batches = {
    key: rows for stage in stages for key, rows in stage.get_row_splits(config).items()
  }
  wrong = [
    f"  --config.{key}: {batch.rows} rows in {batch.parts} parts on {shards} row shards"
    f" of the mesh (data x fsdp); {batch.rows} must be a multiple of "
    f"{batch.parts * shards}"
    for key, batch in batches.items()
    if not batch.is_divisible_by(shards)
  ]
  if wrong:
    raise UserError(
      "batches that do not divide:\n"
      + "\n".join(wrong)
      + "\nChange the size, or raise --config.mesh.tensor."
    )


def check_mesh(config: ConfigDict, stages: Iterable[Stage]) -> None:
  """Checks that the context axis of the mesh divides the rows of training batches.

  Other prompts may have any length, because models pad them.

  Raises:
    UserError: A length does not divide. The message lists all of them.
  """
  context = sharding.make_mesh(**config.mesh).shape["context"]
  if context > 1 and config.model.attention == "cudnn":
    raise UserError(
      "--config.model.attention=cudnn does not support parts of rows, but "
      f"--config.mesh.context is {context}: set --config.model.attention=xla, or "
      "--config.mesh.context=1"
    )
  lengths = {
    what: n for stage in stages for what, n in stage.get_token_lengths(config).items()
  }
  wrong = [
    f"  {what} is {length}; the next valid one is {-(-length // context) * context}"
    for what, length in lengths.items()
    if length % context
  ]
  if wrong:
    raise UserError(
      f"tokens that mesh.context={context} devices do not divide:\n"
      + "\n".join(wrong)
      + "\nRaise these lengths, or set --config.mesh.context=1."
    )
