"""Functions that several training stages share."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError, check_at_least, user_errors
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import ModelPass, TrainState
from vlmrlaif_jax.data import pipeline, records, tokenization
from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import scoring, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.stage import Rows
from vlmrlaif_jax.training import alarms, loop
from vlmrlaif_jax.training import update as updates
from vlmrlaif_jax.training.job import TrainingJob, TrainingSchedule


def default_config(method: ConfigDict, **own: Any) -> ConfigDict:
  """Returns the settings of a training stage.

  Args:
    method: settings of the stage's method.
    own: further settings of the stage.
  """
  optimizer = updates.default_config()
  del optimizer.steps  # Follows from how long the stage is.
  config = ConfigDict(
    dict(
      batch_size=placeholder(int),
      microbatches=1,  # Parts of a batch that are worked on in turn, for memory.
      optimizer=optimizer,
      save_every=placeholder(int),  # Steps between two checkpoints.
      log_every=1,
      keep=1,  # Checkpoints.
      alarms=alarms.default_config(),
    )
  )
  config.update(method)
  config.update(own)
  return config


# What a section of the config says.


def schedule_of(config: ConfigDict, steps: int | None = None) -> TrainingSchedule:
  """Returns the schedule that a section sets.

  Args:
    config: a section; see default_config, and rollouts.default_settings if it samples.
    steps: steps of the stage; None for `config.steps`.
  """
  return TrainingSchedule(
    config.steps if steps is None else steps,
    config.save_every,
    config.log_every,
    config.keep,
    config.get("epochs", 1),
    config.get("minibatches", 1),
    config.get("one_step_off", False),
  )


def check_training(
  config: ConfigDict, section: str, schedule: TrainingSchedule
) -> None:
  """Checks the settings that every training stage has.

  Raises:
    UserError: a value is wrong.
  """
  given = config[section]
  with user_errors(section):
    check_at_least(given, {"batch_size": 1, "microbatches": 1, "save_every": 1})
    check_at_least(given, {"log_every": 1, "keep": 1})
    if schedule.steps < 1:
      raise ValueError(f"steps must be 1 or more, not {schedule.steps}")
    alarms.check(given.alarms)
  with user_errors(f"{section}.optimizer"):
    updates.check({**given.optimizer, "steps": schedule.updates})


def training_rows(
  config: ConfigDict, section: str, *, per_row: int = 1
) -> dict[str, Rows]:
  """Returns how the batches of a stage are divided.

  Args:
    per_row: rows of an update for each row of `batch_size`.
  """
  given = config[section]
  parts = given.microbatches * given.get("minibatches", 1)
  return {f"{section}.batch_size": Rows(given.batch_size * per_row, parts)}


def policy_lengths(config: ConfigDict, section: str) -> dict[str, int]:
  """Returns the lengths of a prompt with a response, and of a chunk of logits."""
  data = config.data
  return {
    f"{section}.chunk": config[section].chunk,
    f"{section}: data.prompt_len + data.response_len": data.prompt_len
    + data.response_len,
  }


def judge_lengths(config: ConfigDict, section: str) -> dict[str, int]:
  """Returns the lengths of rows of a judge's prompt and reply, and of a chunk."""
  given = config[section]
  return {
    f"{section}.chunk": given.chunk,
    f"{section}.prompt_len + {section}.max_new": given.prompt_len + given.max_new,
  }


# Training.


def fit(
  run: Run, stage: str, folder: pathlib.Path, log: Log, job: TrainingJob
) -> TrainState:
  """Trains a stage's job on the run's mesh; see loop.fit."""
  return loop.fit(
    job,
    key=key_of(run, stage),
    place=lambda tree: sharding.shard_by_rules(tree, vlm.SHARDING, run.mesh),
    folder=str(folder),
    log=log,
    watch=run.watch,
  )


def offline_workload(
  run: Run,
  job: TrainingJob,
  rows: int,
  tokens: int,
  *,
  first: Sequence[workloads.Function] = (),
  last: Sequence[workloads.Function] = (),
  note: str = "",
) -> Workload:
  """Returns what a stage runs that learns from data as it is.

  Args:
    rows: examples or pairs of a step.
    tokens: tokens of a step.
    first: functions that run before training.
    last: functions that run after training.
    note: an assumption about the data.
  """
  each = [
    workloads.encode(run, rows),
    *first,
    *workloads.job_functions(run, job),
    *last,
  ]
  return Workload(each, job.schedule.steps, rows, tokens, note)


def train_pass(
  run: Run,
  role: str,
  model: vlm.VLM,
  rows: int,
  time: int,
  config: ConfigDict,
  **groups: int,
) -> ModelPass:
  """Returns the pass of an update; see workloads.model_pass."""
  return workloads.model_pass(run, "train", role, model, rows, time, config, **groups)


def key_of(run: Run, stage: str) -> Key[Array, ""]:
  """Of all that is random in a stage; each step folds in its number."""
  return jax.random.fold_in(jax.random.key(run.config.seed), hash_of(stage))


def hash_of(name: str) -> int:
  """A number for a stage's name, the same in every process."""
  return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31


# Data.


def encoded(
  run: Run,
  examples: Sequence[Example],
  log: Log,
  *,
  answered: bool,
  prompt_len: int,
  response_len: int,
  names: tuple[str, str] = ("data.prompt_len", "data.response_len"),
) -> tuple[list[Example], tokenization.Rows, list[records.Problem]]:
  """(examples that fit, their rows, problems of the others, which are told of).

  Args:
    answered, prompt_len, response_len, names: see pipeline.encode_examples.
  """
  made = pipeline.encode_examples(
    examples,
    run.tokenizer,
    run.template,
    answered=answered,
    video_tokens=run.policy.video_tokens(run.config.model.frames),
    prompt_len=prompt_len,
    response_len=response_len,
    names=names,
  )
  tell_of(made[2], len(examples), log)
  return made


def order_of(run: Run, count: int, size: int, step: int) -> np.ndarray:
  """The numbers of a step's examples."""
  order = pipeline.rows_of_step(count, size, seed=run.config.seed, step=step)
  return np.asarray(order)


def preferences(
  run: Run, source: str | pathlib.Path, log: Log, *, least: int
) -> list[PreferenceExample]:
  """The preferences of a file that can be learned from; the others are told of.

  Args:
    least: how many there must be: a batch.

  Raises:
    UserError: there are fewer.
  """
  videos = video.videos_folder(run)
  pairs, problems = records.read_preferences(source, videos=videos)
  total = len(pairs) + len(problems)
  pairs, more = scoring.scorable(run, pairs)
  if total:
    tell_of(problems + more, total, log)
  if len(pairs) < least:
    raise UserError(
      f"{source} holds {len(pairs)} usable preferences, fewer than a batch of {least}: "
      "label more prompts, or lower the stage's batch_size"
    )
  return pairs


def tell_of(problems: Sequence[records.Problem], total: int, log: Log) -> None:
  if problems:
    log.note(records.report_problems(problems, total=total))
  if len(problems) == total:
    raise UserError(
      f"{log.stage} has no record to learn from: what is wrong with "
      f"each of the {total} stands above"
    )
