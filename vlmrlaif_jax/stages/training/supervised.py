"""PROGRAM: the stages that train on data as it is: SFT, reward model."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import (
  Groups,
  Packed,
  Params,
  Parts,
  join,
)
from vlmrlaif_jax.data import pipeline, tokenization
from vlmrlaif_jax.data.records import PreferenceExample
from vlmrlaif_jax.methods import rm as rm_method
from vlmrlaif_jax.methods import sft as sft_method
from vlmrlaif_jax.runtime import role_params, scoring
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import packed_batches
from vlmrlaif_jax.stages.training.common import encoded, fit, preferences, sft_data
from vlmrlaif_jax.training import loop

MEASURED = 64  # Held-out pairs that a reward model is measured on while it learns.


def sft(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """One stage of the curriculum; trains LoRA and projector on the base."""
  config = run.config.sft
  easy, hard = pipeline.curriculum(
    run.splits.sft, short_share=config.short_share, threshold=config.threshold
  )
  short, long = role_params.SFT
  examples = easy if stage == short else hard
  kept, rows, problems = encoded(
    run, examples, log, answered=True, response_len=run.config.data.response_len
  )
  start = (
    role_params.policy_of(run, short)
    if stage == long
    else role_params.initial_policy(run)
  )
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


def rm(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the reward model on preferences: those given, or of the label stage."""
  config = run.config.rm
  source = config.preferences or run.workdir / "label" / "preferences.jsonl"
  pairs = preferences(run, source, log, least=config.batch_size)
  train, held = pipeline.hold_out(pairs, config.holdout, run.config.seed)
  base = role_params.scorer_base(run)
  state = fit(
    run,
    stage,
    folder,
    log,
    config,
    rm_method.make(config, Parts(reward_model=run.scorer)),
    steps=config.steps,
    params={"reward": role_params.initial_scorer(run)},
    frozen={"reward": base},
    data=rm_data(run, log, train),
    hooks=_held_out(run, base, held),
  )
  accuracy = scoring.pair_accuracy(run, join(base, state.params["reward"]), held)
  log.note(
    f"rm: {accuracy:.1%} of {len(held)} held-out pairs are ranked as the judge did"
  )
  return {"pairs": len(train), "held_out": len(held), "held_out_accuracy": accuracy}


def _held_out(run: Run, base: Params, held: Sequence[PreferenceExample]) -> loop.Hooks:
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


def rm_data(
  run: Run, log: Log, pairs: Sequence[PreferenceExample]
) -> Callable[[int], Groups | Packed]:
  """From a step to its pairs, in rows of their own or packed."""
  config = run.config.rm
  if not config.pack_len:
    return lambda step: scoring.pairs_of_step(run, pairs, config.batch_size, step)
  suffix = tokenization.suffix_ids(run.tokenizer, run.prompts.reward)
  sides = lambda numbers: scoring.pair_rows(run, pairs, numbers, suffix)
  made = packed_batches.of_steps(
    run, "rm", log, steps=config.steps, examples=pairs, sides=sides
  )
  return lambda step: sharding.put(made(step)[0], run.mesh)
