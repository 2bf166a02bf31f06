"""The stage `rm`: a reward model learns from preferences."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import UserError, check_at_least, user_errors
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Groups, Params, Parts, join
from vlmrlaif_jax.data import pipeline, tokenization
from vlmrlaif_jax.data.records import PreferenceExample
from vlmrlaif_jax.methods import rm as method
from vlmrlaif_jax.runtime import role_params, scoring, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Workload
from vlmrlaif_jax.stages.stage import Stage
from vlmrlaif_jax.stages.training import common
from vlmrlaif_jax.training.job import Hooks, StepOutput, TrainingJob

MEASURED = 64  # Held-out pairs that a reward model is measured on while it learns.


def default_config() -> ConfigDict:
  """Returns the settings of the section `rm`."""
  return common.default_config(
    method.default_config(),
    preferences="",  # A file of preferences; "": what the label stage wrote.
    holdout=0.15,  # Of the videos, to measure on.
    measure_every=placeholder(int),  # Steps between two measures; 0: at the end alone.
    steps=placeholder(int),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `rm`."""
  given = config.rm
  with user_errors("rm"):
    check_at_least(given, {"measure_every": 0, "margin": 0, "centre_coef": 0})
    check_holdout(given)
  common.check_training(config, "rm", common.schedule_of(given))
  if given.microbatches > 1 and given.centre_coef:
    raise UserError(
      f"--config.rm.centre_coef={given.centre_coef} needs the mean of a whole batch, "
      f"which {given.microbatches} microbatches do not have: set one of "
      "--config.rm.centre_coef=0 and --config.rm.microbatches=1"
    )


def check_holdout(config: ConfigDict) -> None:
  """Checks the share of videos that are held out."""
  if not 0 < config.holdout < 1:
    raise ValueError(f"holdout must be between 0 and 1, not {config.holdout}")


def make_job(run: Run) -> TrainingJob:
  """Returns the job that trains the reward model's LoRA and head."""
  config, start = run.config.rm, run.config.data.prompt_len
  rows, time = config.batch_size, _time(run)
  return TrainingJob(
    method=method.make(config, Parts(reward_model=run.scorer)),
    params={"reward": role_params.initial_scorer(run)},
    frozen={"reward": role_params.scorer_base(run)},
    batch_spec=specs.pairs(run, rows, start, time - start),
    schedule=common.schedule_of(config),
    optimizer=config.optimizer,
    passes={
      UPDATE: [
        common.train_pass(
          run, "reward", run.scorer, rows, time, config, start=start, group=2
        )
      ]
    },
    alarms=config.alarms,
    microbatches=config.microbatches,
  )


def _time(run: Run) -> int:
  """Tokens of a prompt, a response and the reward prompt."""
  data = run.config.data
  suffix = tokenization.suffix_ids(run.tokenizer, run.prompts.reward)
  return data.prompt_len + data.response_len + len(suffix)


def train(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains on the preferences of `rm.preferences`, or of the label stage."""
  config = run.config.rm
  pairs, held = split_preferences(run, log, least=config.batch_size)
  job = make_job(run)
  base = job.frozen["reward"]
  job = job._replace(data=_data(run, pairs), hooks=_held_out(run, base, held))
  state = common.fit(run, stage, folder, log, job)
  accuracy = scoring.pair_accuracy(run, join(base, state.params["reward"]), held)
  log.note(
    f"rm: {accuracy:.1%} of {len(held)} held-out pairs are ranked as the judge did"
  )
  return {"pairs": len(pairs), "held_out": len(held), "held_out_accuracy": accuracy}


def split_preferences(
  run: Run, log: Log, *, least: int
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
  """Returns the pairs to learn from and the pairs held out.

  Args:
    least: how many pairs there must be in all.
  """
  config = run.config.rm
  source = config.preferences or run.workdir / "label" / "preferences.jsonl"
  pairs = common.preferences(run, source, log, least=least)
  return pipeline.hold_out(pairs, config.holdout, run.config.seed)


def _data(run: Run, pairs: Sequence[PreferenceExample]) -> Callable[[int], Groups]:
  size = run.config.rm.batch_size
  return lambda step: scoring.pairs_of_step(run, pairs, size, step)


def _held_out(run: Run, base: Params, held: Sequence[PreferenceExample]) -> Hooks:
  """Measures a reward model every so many steps, just before the last of them."""
  every = run.config.rm.measure_every
  measured: dict[str, float] = {}

  def before(step: int, params: Params) -> dict[str, Any]:
    measured.clear()
    if every and (step + 1) % every == 0:
      now = join(base, params["reward"])
      right = scoring.pair_accuracy(run, now, held[:MEASURED])
      measured["held_out_accuracy"] = right
    return {}

  on_step = lambda step, data, info: StepOutput({}, dict(measured))
  return Hooks(before=before, on_step=on_step)


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  rows, data = run.config.rm.batch_size, run.config.data
  score = workloads.score(run, data.prompt_len + data.response_len, 0.0)
  tokens = 2 * rows * _time(run)
  return common.offline_workload(run, make_job(run), rows, tokens, last=[score])


STAGES = (
  Stage(
    name="rm",
    title="Reward model",
    section="rm",
    run=train,
    total_steps=lambda run: run.config.rm.steps,
    check=check,
    batches=lambda config: common.training_rows(config, "rm"),
    schedule=lambda config: common.schedule_of(config.rm),
    workload=workload,
    paper="2402.03746",
  ),
)
