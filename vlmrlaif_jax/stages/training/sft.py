"""The stages `sft_short` and `sft_long`: a curriculum of supervised fine-tuning.

VLM-RLAIF (2402.03746) fine-tunes on short answers first and on long ones after them.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import check_at_least, user_errors
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Batch, Packed, Params, Parts
from vlmrlaif_jax.data import pipeline, tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.methods import sft as method
from vlmrlaif_jax.runtime import role_params, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Workload
from vlmrlaif_jax.stages.stage import Stage, row_lengths, stage_of
from vlmrlaif_jax.stages.training import common, packed_batches
from vlmrlaif_jax.training.job import TrainingJob

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


def check(config: ConfigDict) -> None:
  """Checks the section `sft`."""
  with user_errors("sft"):
    check_at_least(config.sft, {"threshold": 0})
    if not 0 <= config.sft.short_share <= 1:
      raise ValueError(f"short_share must be from 0 to 1, not {config.sft.short_share}")


def make_job(run: Run, stage: str) -> TrainingJob:
  """Returns the job that trains LoRA and projector on the base."""
  if stage == LONG:
    return imitation_job(run, stage, role_params.policy_of(run, SHORT), run.base)
  return imitation_job(run, stage, role_params.initial_policy(run), run.base)


def imitation_job(run: Run, stage: str, start: Params, base: Params) -> TrainingJob:
  """Returns a job that imitates answers.

  Args:
    run: the run.
    stage: the stage that trains.
    start: the trained part of the policy, as it starts.
    base: the frozen part of the policy.
  """
  section = stage_of(stage).section
  config, time = run.config[section], sum(row_lengths(run.config, section))
  rows = config.batch_size
  learns = workloads.model_pass(run, "train", "policy", rows, time, config)
  spec: Batch | Packed = specs.batch(run, rows, time)
  if config.pack_len:
    spec = specs.packed(run, config, rows, time)
    packed_rows, videos = spec.video.shape[:2]
    frames = learns.frames * videos
    learns = learns._replace(rows=packed_rows, time=config.pack_len, frames=frames)
  return common.job_of(
    run,
    stage,
    method=method.make(config, Parts(policy=run.policy)),
    params={"policy": start},
    frozen={"policy": base},
    batch_spec=spec,
    passes={UPDATE: [learns]},
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Runs one stage of the curriculum."""
  config = run.config.sft
  easy, hard = pipeline.curriculum(
    run.splits.sft, short_share=config.short_share, threshold=config.threshold
  )
  asked = easy if stage == SHORT else hard
  examples, rows, problems = common.encoded(run, "sft", asked, log, answered=True)
  imitate(run, stage, folder, log, make_job(run, stage), examples, rows)
  return {
    "examples": len(examples),
    "left_out": len(problems),
    "longest_answer": int(rows.loss_mask.sum(1).max()),
  }


def imitate(
  run: Run,
  stage: str,
  folder: pathlib.Path,
  log: Log,
  job: TrainingJob,
  examples: Sequence[Example],
  rows: tokenization.Rows,
) -> None:
  """Trains on examples, in rows of their own or packed.

  Args:
    run: the run.
    stage: the stage that trains.
    folder: its folder.
    log: its log.
    job: see imitation_job.
    examples: the examples.
    rows: their rows; see common.encoded.
  """
  section = stage_of(stage).section
  config = run.config[section]
  data: Callable[[int], Batch | Packed]
  if config.pack_len:
    steps = job.schedule.steps
    data = packed_batches.of_steps(run, section, log, steps, examples, rows)
  else:
    data = common.example_batches(run, examples, rows, config.batch_size)
  common.fit(run, stage, folder, log, job._replace(data=data))


def imitation_workload(run: Run, stage: str, job: TrainingJob) -> Workload:
  """Returns what a stage of imitation runs."""
  section = stage_of(stage).section
  config = run.config[section]
  note = (
    f"  {config.batch_size} examples are packed in rows of {config.pack_len} tokens: "
    "as many rows as would be full if each were at its longest; a run's data has less"
  )
  return common.job_workload(
    run,
    config,
    job,
    tokens=config.batch_size * sum(row_lengths(run.config, section)),
    note=note if config.pack_len else "",
  )


def workload(run: Run, stage: str) -> Workload:
  """Returns what a stage of the curriculum runs."""
  return imitation_workload(run, stage, make_job(run, stage))


STAGES = (
  Stage(
    name=SHORT,
    title="Supervised fine-tuning (SFT): short answers",
    section="sft",
    run=train,
    check=check,
    steps="short_steps",
    workload=workload,
    paper="2402.03746",
  ),
  Stage(
    name=LONG,
    title="Supervised fine-tuning (SFT): long answers",
    section="sft",
    run=train,
    check=check,
    steps="long_steps",
    workload=workload,
    paper="2402.03746",
  ),
)
