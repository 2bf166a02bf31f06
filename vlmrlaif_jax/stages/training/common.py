"""Configuration, jobs, batches and preferences that several training stages share."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Batch, TrainState
from vlmrlaif_jax.data import pipeline, records, tokenization
from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.huggingface import families
from vlmrlaif_jax.runtime import scoring, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.stage import get_length_settings, get_row_lengths, get_stage
from vlmrlaif_jax.training import alarms, loop
from vlmrlaif_jax.training import update as updates
from vlmrlaif_jax.training.job import TrainingJob


def default_config(method: ConfigDict, **own: Any) -> ConfigDict:
  """Returns the settings of a training stage.

  They are the common ones, those of its `method` and its `own`.
  """
  config = ConfigDict(
    dict(
      batch_size=placeholder(int),
      microbatches=1,  # Parts of a batch that are processed in turn, to save memory.
      optimizer=updates.default_config(),
      save_every=placeholder(int),  # Steps between two checkpoints.
      log_every=1,  # Steps between two lines of metrics.
      keep=1,  # Number of checkpoints that stay on disk.
      alarms=alarms.default_config(),
    )
  )
  config.update(method)
  config.update(own)
  return config


# Training.


def fit_stage(run: Run, log: StageLog, job: TrainingJob) -> TrainState:
  """Trains the job of the log's stage on the run's mesh; see loop.fit_job."""
  return loop.fit_job(
    job,
    key=_make_key(run, log.stage),
    place=lambda tree: sharding.shard_by_rules(tree, families.SHARDING, run.mesh),
    log=log,
    watch=run.watch,
  )


def _make_key(run: Run, name: str) -> Key[Array, ""]:
  return jax.random.fold_in(jax.random.key(run.config.seed), zlib.crc32(name.encode()))


def make_training_job(run: Run, stage: str, **parts: Any) -> TrainingJob:
  """Returns a job with the settings of the stage's section of the config.

  `parts` are the remaining fields of TrainingJob.
  """
  entry = get_stage(stage)
  config = run.config[entry.section]
  dropout_key = None
  if run.config.model.lora_dropout:
    dropout_key = _make_key(run, f"{stage} dropout")
  return TrainingJob(
    schedule=entry.make_schedule(run.config),
    optimizer=config.optimizer,
    alarms=config.alarms,
    microbatches=config.microbatches,
    dropout_key=dropout_key,
    **parts,
  )


def make_training_workload(
  run: Run,
  stage: str,
  job: TrainingJob,
  *,
  first: Sequence[workloads.DeviceFunction] = (),
  last: Sequence[workloads.DeviceFunction] = (),
  rows: int = 0,
  tokens: int = 0,
  note: str = "",
) -> Workload:
  """Returns the workload of a training stage.

  Args:
    run: The run.
    stage: Name of the stage.
    job: Job of the stage.
    first: Functions that run before the update.
    last: Functions that run after training.
    rows: Examples of a step; 0 for the section's batch_size.
    tokens: Tokens of a step; 0 for those that one pass of its updates reads.
    note: An assumption about the data.
  """
  *collect, update = workloads.make_job_functions(run, job)
  first_pass = job.passes[workloads.UPDATE][0]
  tokens_per_update = first_pass.rows * first_pass.group * first_pass.time
  tokens = tokens or tokens_per_update * job.schedule.minibatches
  rows = rows or run.config[get_stage(stage).section].batch_size
  encode = workloads.make_encode_function(run, rows)
  functions = [encode, *collect, *first, update, *last]
  return Workload(functions, job.schedule.steps, rows, tokens, note)


# Data.


def tokenize_for_stage(
  run: Run, section: str, examples: Sequence[Example], log: StageLog, *, answered: bool
) -> tuple[list[Example], tokenization.TokenRows, list[records.SkippedRecord]]:
  """Tokenizes examples in rows of a section's lengths.

  Args:
    run: The run.
    section: Section of the config; see stage.get_row_lengths.
    examples: Examples to tokenize.
    log: Log that receives the skipped records.
    answered: Whether rows contain the answers, or prompts alone.

  Returns:
    The examples that fit, their rows, and the skipped records.

  Raises:
    UserError: No example fits.
  """
  prompt_len, response_len = get_row_lengths(run.config, section)
  outputs = pipeline.tokenize_examples(
    examples,
    run.tokenizer,
    run.template,
    answered=answered,
    lay_out=run.lay_out_video,
    prompt_len=prompt_len,
    response_len=response_len if answered else 0,
    names=get_length_settings(run.config, section),
  )
  log_skipped_records(outputs[2], len(examples), log)
  return outputs


def batch_indices(run: Run, count: int, size: int, step: int) -> np.ndarray:
  """Returns the indices of a step's `size` examples out of `count`."""
  return pipeline.shuffled_row_indices(count, size, seed=run.config.seed, step=step)


def make_batch_fn(
  run: Run, count: int, size: int, make: Callable[[np.ndarray], Any]
) -> Callable[[int], Any]:
  """Returns a function from a step to its batch on the devices.

  Args:
    run: The run.
    count: Total number of examples.
    size: Examples per step.
    make: Function from indices of this process's examples to their batch.
  """

  def load_batch(step: int) -> Any:
    indices = batch_indices(run, count, size, step)
    return sharding.shard_batch(
      make(indices[distributed.local_rows(size, run.mesh)]), run.mesh
    )

  return load_batch


def make_example_batch_fn(
  run: Run, examples: Sequence[Example], rows: tokenization.TokenRows, size: int
) -> Callable[[int], Batch]:
  """Returns a function from a step to its batch of tokenized examples."""

  def make(indices: np.ndarray) -> Batch:
    features = run.features.stack(examples[i]["video"] for i in indices)
    return Batch(features, *(column[indices] for column in rows))

  return make_batch_fn(run, len(examples), size, make)


def load_training_preferences(
  run: Run, section: str, log: StageLog, *, min_count: int, stage: str = "label"
) -> list[PreferenceExample]:
  """Returns the preferences that a stage can train on.

  Args:
    run: The run.
    section: Section of the config whose `preferences` names their file.
    log: Log that receives the skipped records.
    min_count: Minimum number of preferences: a batch.
    stage: Stage that wrote the preferences if the config names no file.

  Raises:
    UserError: There are fewer preferences.
  """
  file = run.config[section].preferences
  source = file or run.workdir / stage / "preferences.jsonl"
  pairs, problems = video.read_run_preferences(run, source)
  total = len(pairs) + len(problems)
  pairs, unscorable = scoring.select_scorable(run, pairs)
  if total:
    log_skipped_records(problems + unscorable, total, log)
  if len(pairs) < min_count:
    raise UserError(
      f"{source} has {len(pairs)} usable preferences, fewer than a batch of "
      f"{min_count}: label more prompts, or lower --config.{section}.batch_size"
    )
  return pairs


def log_skipped_records(
  problems: Sequence[records.SkippedRecord], total: int, log: StageLog
) -> None:
  """Logs the skipped records of `total` records.

  Raises:
    UserError: All records are skipped.
  """
  if problems:
    log.print_note(records.format_skipped_records(problems, total=total))
  if not total:
    raise UserError(f"{log.stage} has no record to learn from: give it records")
  if len(problems) == total:
    raise UserError(
      f"{log.stage} has no record to learn from: all {total} are skipped for the "
      "reasons above; correct the records, or give other data"
    )
