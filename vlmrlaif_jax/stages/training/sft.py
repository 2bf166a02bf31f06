"""The stages `sft_short` and `sft_long`: a curriculum of supervised fine-tuning.

VLM-RLAIF (2402.03746) fine-tunes on short answers first and on long ones after them.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import check_at_least, user_errors
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Batch, Packed, Params, Parts
from vlmrlaif_jax.data import pipeline, tokenization
from vlmrlaif_jax.methods import sft as method
from vlmrlaif_jax.runtime import role_params, specs, video
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Workload
from vlmrlaif_jax.stages.stage import Stage
from vlmrlaif_jax.stages.training import common, packed_batches
from vlmrlaif_jax.training.job import TrainingJob, TrainingSchedule

SHORT, LONG = role_params.SFT


def default_config() -> ConfigDict:
  """Returns the settings of the section `sft`."""
  return common.default_config(
    method.default_config(),
    # Of the records, by length of answer, that the first stage reads.
    short_share=placeholder(float),
    threshold=0,  # Longest easy answer, in words; 0: by the share.
    short_steps=placeholder(int),
    long_steps=placeholder(int),
    # Tokens of a row that several examples share; 0: a row to each.
    pack_len=placeholder(int),
  )


def schedule(config: ConfigDict, stage: str) -> TrainingSchedule:
  """Returns the schedule of a stage of the curriculum."""
  steps = config.sft.short_steps if stage == SHORT else config.sft.long_steps
  return common.schedule_of(config.sft, steps)


def check(config: ConfigDict, stage: str) -> None:
  """Checks the section `sft`."""
  with user_errors("sft"):
    check_at_least(config.sft, {"pack_len": 0, "chunk": 1, "threshold": 0})
    if not 0 <= config.sft.short_share <= 1:
      raise ValueError(f"short_share must be from 0 to 1, not {config.sft.short_share}")
  common.check_training(config, "sft", schedule(config, stage))


def make_job(run: Run, stage: str) -> TrainingJob:
  """Returns the job that trains LoRA and projector on the base."""
  start = (
    role_params.policy_of(run, SHORT)
    if stage == LONG
    else role_params.initial_policy(run)
  )
  config, data = run.config.sft, run.config.data
  time = data.prompt_len + data.response_len
  return imitation_job(run, config, time, schedule(run.config, stage), start, run.base)


def imitation_job(
  run: Run,
  config: ConfigDict,
  time: int,
  plan: TrainingSchedule,
  start: Params,
  base: Params,
) -> TrainingJob:
  """Returns a job that imitates answers.

  Args:
    config: the section of the stage.
    time: tokens of a row.
    plan: the schedule.
    start: the trained part of the policy, as it starts.
    base: the frozen part of the policy.
  """
  rows = config.batch_size
  learns = common.train_pass(run, "policy", run.policy, rows, time, config)
  spec: Batch | Packed = specs.batch(run, rows, time)
  if config.pack_len:
    spec = specs.packed(run, config, rows, time)
    packed_rows, videos = spec.video.shape[:2]
    frames = learns.frames * videos
    learns = learns._replace(rows=packed_rows, time=config.pack_len, frames=frames)
  return TrainingJob(
    method=method.make(config, Parts(policy=run.policy)),
    params={"policy": start},
    frozen={"policy": base},
    batch_spec=spec,
    schedule=plan,
    optimizer=config.optimizer,
    passes={UPDATE: [learns]},
    alarms=config.alarms,
    microbatches=config.microbatches,
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Runs one stage of the curriculum."""
  config = run.config.sft
  easy, hard = pipeline.curriculum(
    run.splits.sft, short_share=config.short_share, threshold=config.threshold
  )
  examples, rows, problems = common.encoded(
    run,
    easy if stage == SHORT else hard,
    log,
    answered=True,
    prompt_len=run.config.data.prompt_len,
    response_len=run.config.data.response_len,
  )
  job = make_job(run, stage)
  data = imitation_data(run, "sft", log, job.schedule.steps, examples, rows)
  common.fit(run, stage, folder, log, job._replace(data=data))
  return {
    "examples": len(examples),
    "left_out": len(problems),
    "longest_answer": int(rows.loss_mask.sum(1).max()),
  }


def imitation_data(
  run: Run, section: str, log: Log, steps: int, examples, rows: tokenization.Rows
) -> Callable[[int], Batch | Packed]:
  """From a step to its examples, in rows of their own or packed."""
  config = run.config[section]
  if not config.pack_len:
    order = lambda step: common.order_of(run, len(examples), config.batch_size, step)
    return lambda step: video.batch_of(run, examples, rows, order(step))
  select = lambda numbers: tokenization.Rows(
    *(column[np.asarray(numbers)] for column in rows)
  )
  packed = packed_batches.of_steps(
    run, section, log, steps=steps, examples=examples, rows=select
  )
  return lambda step: sharding.put(packed(step), run.mesh)


def imitation_workload(
  run: Run, job: TrainingJob, config: ConfigDict, time: int
) -> Workload:
  """Returns what a stage of imitation runs.

  Args:
    time: tokens of a row.
  """
  note = (
    f"  {config.batch_size} examples are packed in rows of {config.pack_len} tokens: "
    "as many rows as would be full if each were at its longest; a run's data has less"
  )
  rows = config.batch_size
  return common.offline_workload(
    run, job, rows, rows * time, note=note if config.pack_len else ""
  )


def workload(run: Run, stage: str) -> Workload:
  """Returns what a stage of the curriculum runs."""
  data = run.config.data
  time = data.prompt_len + data.response_len
  return imitation_workload(run, make_job(run, stage), run.config.sft, time)


def _declare(name: str, title: str) -> Stage:
  return Stage(
    name=name,
    title=title,
    section="sft",
    run=train,
    total_steps=lambda run: schedule(run.config, name).steps,
    check=lambda config: check(config, name),
    batches=lambda config: common.training_rows(config, "sft"),
    lengths=lambda config: common.policy_lengths(config, "sft"),
    schedule=lambda config: schedule(config, name),
    workload=workload,
    paper="2402.03746",
  )


STAGES = (
  _declare(SHORT, "Supervised fine-tuning (SFT): short answers"),
  _declare(LONG, "Supervised fine-tuning (SFT): long answers"),
)
