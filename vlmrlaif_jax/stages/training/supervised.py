"""PROGRAM: the stages that train on data as it is: SFT, reward model."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from vlmrlaif_jax import (
  alarms,
  build,
  hosts,
  loop,
  packed,
  roles,
  scoring,
  sharding,
)
from vlmrlaif_jax import update as updates
from vlmrlaif_jax.data import pipeline, records, text
from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.methods import rm as rm_method
from vlmrlaif_jax.methods import sft as sft_method
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.types import (
  Batch,
  Groups,
  Method,
  Packed,
  Params,
  Parts,
  TrainState,
  join,
)

MEASURED = 64  # Held-out pairs that a reward model is measured on while it learns.


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


def sft(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """One stage of the curriculum; trains LoRA and projector on the base."""
  config = run.config.sft
  easy, hard = pipeline.curriculum(
    run.splits.sft, short_share=config.short_share, threshold=config.threshold
  )
  short, long = roles.SFT
  examples = easy if stage == short else hard
  kept, rows, problems = encoded(
    run, examples, log, answered=True, response_len=run.config.data.response_len
  )
  start = roles.policy_of(run, short) if stage == long else roles.initial_policy(run)
  steps = config.short_steps if stage == short else config.long_steps
  fit(
    run,
    stage,
    folder,
    log,
    config,
    sft_method.make(config, Parts(policy=run.policy)),
    steps=steps,
    params={"policy": start},
    frozen={"policy": run.base},
    data=sft_data(run, "sft", log, steps, kept, rows),
  )
  return {
    "examples": len(kept),
    "left_out": len(problems),
    "longest_answer": int(rows.loss_mask.sum(1).max()),
  }


def rm(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the reward model on preferences: those given, or of the label stage."""
  config = run.config.rm
  source = config.preferences or run.workdir / "label" / "preferences.jsonl"
  pairs = preferences(run, source, log, least=config.batch_size)
  train, held = pipeline.hold_out(pairs, config.holdout, run.config.seed)
  base = roles.scorer_base(run)
  state = fit(
    run,
    stage,
    folder,
    log,
    config,
    rm_method.make(config, Parts(reward_model=run.scorer)),
    steps=config.steps,
    params={"reward": roles.initial_scorer(run)},
    frozen={"reward": base},
    data=rm_data(run, log, train),
    hooks=_held_out(run, base, held),
  )
  accuracy = scoring.pair_accuracy(run, join(base, state.params["reward"]), held)
  log.note(
    f"rm: {accuracy:.1%} of {len(held)} held-out pairs are ranked as the judge did"
  )
  return {"pairs": len(train), "held_out": len(held), "held_out_accuracy": accuracy}


def _held_out(
  run: build.Run, base: Params, held: Sequence[PreferenceExample]
) -> loop.Hooks:
  """Measures a reward model every so many steps, just before the last of them."""
  every, measured = run.config.rm.measure_every, {}

  def before(step, params):
    measured.clear()
    if every and (step + 1) % every == 0:
      now = join(base, params["reward"])
      right = scoring.pair_accuracy(run, now, held[:MEASURED])
      measured["held_out_accuracy"] = right
    return {}

  on_step = lambda step, data, info: loop.Told({}, dict(measured))
  return loop.Hooks(before=before, on_step=on_step)


# Common.


def fit(
  run: build.Run,
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


def key_of(run: build.Run, stage: str) -> Key[Array, ""]:
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
    video_tokens=build.video_tokens(run, run.config.model.frames),
    prompt_len=run.config.data.prompt_len,
    response_len=response_len,
  )
  tell_of(made[2], len(examples), log)
  return made


def order_of(run, count: int, size: int, step: int) -> np.ndarray:
  """The numbers of a step's examples."""
  order = pipeline.rows_of_step(count, size, seed=run.config.seed, step=step)
  return np.asarray(order)


def batch_of(run, examples: Sequence[Example], rows: text.Rows, size, step) -> Batch:
  return rows_of(run, examples, rows, order_of(run, len(examples), size, step))


def rows_of(run, examples: Sequence[Example], rows: text.Rows, order) -> Batch:
  """The rows of these numbers, of which each process reads its own."""
  order = order[hosts.mine(len(order), run.mesh)]
  video = build.stack_features(run.features, [examples[i]["video"] for i in order])
  batch = Batch(video, *(column[order] for column in rows))
  return sharding.put(batch, run.mesh)


def sft_data(
  run: build.Run, section: str, log: Log, steps: int, examples, rows: text.Rows
) -> Callable[[int], Batch | Packed]:
  """From a step to its examples, in rows of their own or packed."""
  config = run.config[section]
  if not config.pack_len:
    return lambda step: batch_of(run, examples, rows, config.batch_size, step)
  sides = lambda numbers: (text.Rows(*(column[numbers] for column in rows)),)
  made = packed.of_steps(run, section, log, steps=steps, examples=examples, sides=sides)
  return lambda step: sharding.put(made(step)[0], run.mesh)


def rm_data(
  run: build.Run, log: Log, pairs: Sequence[PreferenceExample]
) -> Callable[[int], Groups | Packed]:
  """From a step to its pairs, in rows of their own or packed."""
  config = run.config.rm
  if not config.pack_len:
    return lambda step: scoring.pairs_of_step(run, pairs, config.batch_size, step)
  suffix = text.suffix_ids(run.tokenizer, run.prompts.reward)
  sides = lambda numbers: scoring.pair_rows(run, pairs, numbers, suffix)
  made = packed.of_steps(
    run, "rm", log, steps=config.steps, examples=pairs, sides=sides
  )
  return lambda step: sharding.put(made(step)[0], run.mesh)


def preferences(
  run: build.Run, source: str | pathlib.Path, log: Log, *, least: int
) -> list[PreferenceExample]:
  """The preferences of a file that can be learned from; the others are told of.

  Args:
    least: how many there must be: a batch.

  Raises:
    ValueError: there are fewer.
  """
  videos = build.videos_folder(run.config, run.workdir)
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
