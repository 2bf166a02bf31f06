"""Functions that several training stages share."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import (
  Batch,
  Method,
  Packed,
  Params,
  TrainState,
)
from vlmrlaif_jax.data import pipeline, records, tokenization
from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime import scoring, video_features
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import packed_batches
from vlmrlaif_jax.training import alarms, loop
from vlmrlaif_jax.training import update as updates


def default_stage(**given) -> ConfigDict:
  """Settings that every training stage has."""
  optimizer = updates.default_config()
  del optimizer.steps  # Follows from how long the stage is.
  return ConfigDict(
    {
      "batch_size": 32,
      "microbatches": 1,  # Parts of a batch that are worked on in turn, for memory.
      "optimizer": optimizer,
      "save_every": 50,
      "log_every": 1,
      "keep": 1,  # Checkpoints.
      "alarms": alarms.default_config(),
      **given,
    }
  )


def fit(
  run: Run,
  stage: str,
  folder: pathlib.Path,
  log: Log,
  config: ConfigDict,
  method: Method,
  *,
  steps: int,
  params: Params,
  frozen: Params,
  data: Callable[[int], Any],
  hooks: loop.Hooks = loop.NO_HOOKS,
  epochs: int = 1,
  minibatches: int = 1,
  one_step_off: bool = False,
) -> TrainState:
  """A stage's training as its section of the config says; see loop.fit."""
  return loop.fit(
    method=method,
    params=params,
    frozen=frozen,
    data=data,
    key=key_of(run, stage),
    plan=loop.Plan(
      steps,
      config.save_every,
      config.log_every,
      config.keep,
      epochs,
      minibatches,
      one_step_off,
    ),
    optimizer=config.optimizer,
    microbatches=config.microbatches,
    place=lambda tree: sharding.shard_by_rules(tree, vlm.SHARDING, run.mesh),
    folder=str(folder),
    log=log,
    hooks=hooks,
    watch=run.watch,
    alarms=config.alarms,
  )


def key_of(run: Run, stage: str) -> Key[Array, ""]:
  """Of all that is random in a stage; each step folds in its number."""
  return jax.random.fold_in(jax.random.key(run.config.seed), hash_of(stage))


def hash_of(name: str) -> int:
  """A number for a stage's name, the same in every process."""
  return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31


def encoded(run, examples, log, *, answered: bool, response_len: int):
  """(examples that fit, their rows, problems of the others, which are told of)."""
  made = pipeline.encode_examples(
    examples,
    run.tokenizer,
    run.template,
    answered=answered,
    video_tokens=video_features.video_tokens(run, run.config.model.frames),
    prompt_len=run.config.data.prompt_len,
    response_len=response_len,
  )
  tell_of(made[2], len(examples), log)
  return made


def order_of(run, count: int, size: int, step: int) -> np.ndarray:
  """The numbers of a step's examples."""
  order = pipeline.rows_of_step(count, size, seed=run.config.seed, step=step)
  return np.asarray(order)


def batch_of(
  run, examples: Sequence[Example], rows: tokenization.Rows, size, step
) -> Batch:
  return rows_of(run, examples, rows, order_of(run, len(examples), size, step))


def rows_of(run, examples: Sequence[Example], rows: tokenization.Rows, order) -> Batch:
  """The rows of these numbers, of which each process reads its own."""
  order = order[distributed.mine(len(order), run.mesh)]
  video = video_features.stack_features(
    run.features, [examples[i]["video"] for i in order]
  )
  batch = Batch(video, *(column[order] for column in rows))
  return sharding.put(batch, run.mesh)


def sft_data(
  run: Run, section: str, log: Log, steps: int, examples, rows: tokenization.Rows
) -> Callable[[int], Batch | Packed]:
  """From a step to its examples, in rows of their own or packed."""
  config = run.config[section]
  if not config.pack_len:
    return lambda step: batch_of(run, examples, rows, config.batch_size, step)
  sides = lambda numbers: (tokenization.Rows(*(column[numbers] for column in rows)),)
  made = packed_batches.of_steps(
    run, section, log, steps=steps, examples=examples, sides=sides
  )
  return lambda step: sharding.put(made(step)[0], run.mesh)


def preferences(
  run: Run, source: str | pathlib.Path, log: Log, *, least: int
) -> list[PreferenceExample]:
  """The preferences of a file that can be learned from; the others are told of.

  Args:
    least: how many there must be: a batch.

  Raises:
    ValueError: there are fewer.
  """
  videos = run_lib.videos_folder(run.config, run.workdir)
  pairs, problems = records.read_preferences(source, videos=videos)
  total = len(pairs) + len(problems)
  pairs, more = scoring.scorable(run, pairs)
  if total:
    tell_of(problems + more, total, log)
  if len(pairs) < least:
    raise ValueError(
      f"{source} holds {len(pairs)} usable preferences, fewer than a batch of {least}: "
      "label more prompts, or lower the stage's batch_size"
    )
  return pairs


def tell_of(problems, total: int, log: Log) -> None:
  if problems:
    log.note(records.report_problems(problems, total=total))
  if len(problems) == total:
    raise ValueError(
      f"{log.stage} has no record to learn from: what is wrong with "
      f"each of the {total} stands above"
    )
