"""Functions that several training stages share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Batch, TrainState
from vlmrlaif_jax.data import pipeline, records, tokenization
from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import scoring, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.stage import get_length_settings, get_row_lengths, get_stage
from vlmrlaif_jax.training import alarms, loop
from vlmrlaif_jax.training import update as updates
from vlmrlaif_jax.training.job import TrainingJob


def default_config(method: ConfigDict, **own: Any) -> ConfigDict:
  """Returns the settings of a training stage.

  Args:
    method: settings of the stage's method.
    own: further settings of the stage.
  """
  config = ConfigDict(
    dict(
      batch_size=placeholder(int),
      microbatches=1,  # Parts of a batch that are worked on in turn, for memory.
      optimizer=updates.default_config(),
      save_every=placeholder(int),  # Steps between two checkpoints.
      log_every=1,
      keep=1,  # Checkpoints.
      alarms=alarms.default_config(),
    )
  )
  config.update(method)
  config.update(own)
  return config


# Training.


def fit_stage(run: Run, log: StageLog, job: TrainingJob) -> TrainState:
  """Trains the job of the stage that the log is of, on the run's mesh; see loop.fit."""
  name = sum(ord(c) * 31**i for i, c in enumerate(log.stage)) % 2**31
  return loop.fit_job(
    job,
    key=jax.random.fold_in(jax.random.key(run.config.seed), name),
    place=lambda tree: sharding.shard_by_rules(tree, vlm.SHARDING, run.mesh),
    log=log,
    watch=run.watch,
  )


def make_training_job(run: Run, stage: str, **parts: Any) -> TrainingJob:
  """Returns a job that trains as the stage's section of the config says.

  Args:
    parts: the fields of TrainingJob that the config does not settle.
  """
  entry = get_stage(stage)
  config = run.config[entry.section]
  return TrainingJob(
    schedule=entry.schedule(run.config),
    optimizer=config.optimizer,
    alarms=config.alarms,
    microbatches=config.microbatches,
    **parts,
  )


def make_training_workload(
  run: Run,
  stage: str,
  job: TrainingJob,
  *,
  first: Sequence[workloads.DeviceFunction] = (),
  last: Sequence[workloads.DeviceFunction] = (),
  tokens: int = 0,
  note: str = "",
) -> Workload:
  """Returns what a training stage runs.

  Args:
    first: functions that run before the update.
    last: functions that run after training.
    tokens: tokens of a step; 0 for those that its updates pass over once.
    note: an assumption about the data.
  """
  *collect, update = workloads.make_job_functions(run, job)
  learns = job.passes[workloads.UPDATE][0]
  tokens = tokens or learns.rows * learns.group * learns.time * job.schedule.minibatches
  rows = run.config[get_stage(stage).section].batch_size
  each = [workloads.make_encode_function(run, rows), *collect, *first, update, *last]
  return Workload(each, job.schedule.steps, rows, tokens, note)


# Data.


def tokenize_for_stage(
  run: Run, section: str, examples: Sequence[Example], log: StageLog, *, answered: bool
) -> tuple[list[Example], tokenization.TokenRows, list[records.SkippedRecord]]:
  """Tokenizes examples in rows of a section's lengths.

  Args:
    section: section of the config; see stage.row_lengths.
    log: receives the problems of those that are left out.
    answered: whether rows hold the answers too, or prompts alone.

  Returns:
    The examples that fit, their rows, and problems of the others.
  """
  prompt_len, response_len = get_row_lengths(run.config, section)
  made = pipeline.tokenize_examples(
    examples,
    run.tokenizer,
    run.template,
    answered=answered,
    video_tokens=run.policy.count_video_tokens(run.config.model.frames),
    prompt_len=prompt_len,
    response_len=response_len if answered else 0,
    names=get_length_settings(run.config, section),
  )
  log_skipped_records(made[2], len(examples), log)
  return made


def batch_indices(run: Run, count: int, size: int, step: int) -> np.ndarray:
  """Returns the numbers of a step's `size` examples, of `count`."""
  return pipeline.shuffled_row_indices(count, size, seed=run.config.seed, step=step)


def make_batch_fn(
  run: Run, count: int, size: int, make: Callable[[np.ndarray], Any]
) -> Callable[[int], Any]:
  """Returns a function from a step to its batch on the devices.

  Args:
    count: examples in all.
    size: examples of a step.
    make: from the numbers of the examples that this process reads to their batch.
  """

  def batch(step: int) -> Any:
    order = batch_indices(run, count, size, step)
    return sharding.shard_batch(
      make(order[distributed.local_rows(size, run.mesh)]), run.mesh
    )

  return batch


def make_example_batch_fn(
  run: Run, examples: Sequence[Example], rows: tokenization.TokenRows, size: int
) -> Callable[[int], Batch]:
  """Returns a function from a step to its examples; see `encoded` for the rows."""

  def make(here: np.ndarray) -> Batch:
    features = run.features.stack(examples[i]["video"] for i in here)
    return Batch(features, *(column[here] for column in rows))

  return make_batch_fn(run, len(examples), size, make)


def load_training_preferences(
  run: Run, section: str, log: StageLog, *, least: int, stage: str = "label"
) -> list[PreferenceExample]:
  """Returns the preferences that can be learned from.

  Args:
    section: section of the config whose `preferences` names their file.
    log: receives the problems of the others.
    least: how many there must be: a batch.
    stage: the stage that has written them if the config names no file.

  Raises:
    UserError: there are fewer.
  """
  given = run.config[section].preferences
  source = given or run.workdir / stage / "preferences.jsonl"
  videos = video.get_videos_folder(run)
  pairs, problems = records.read_preferences(source, videos=videos)
  total = len(pairs) + len(problems)
  pairs, more = scoring.select_scorable(run, pairs)
  if total:
    log_skipped_records(problems + more, total, log)
  if len(pairs) < least:
    raise UserError(
      f"{source} holds {len(pairs)} usable preferences, fewer than a batch of {least}: "
      "label more prompts, or lower the stage's batch_size"
    )
  return pairs


def log_skipped_records(
  problems: Sequence[records.SkippedRecord], total: int, log: StageLog
) -> None:
  """Logs the records that are left out.

  Raises:
    UserError: no record is left.
  """
  if problems:
    log.print_note(records.format_skipped_records(problems, total=total))
  if len(problems) == total:
    raise UserError(
      f"{log.stage} has no record to learn from: what is wrong with "
      f"each of the {total} stands above"
    )
