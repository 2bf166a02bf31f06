"""The stage `rm`: a reward model learns from preferences."""

import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import UserError, check_at_least, user_errors
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import MethodModels, Params, merge_params
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.data.records import PreferenceExample
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.methods import rm as method
from vlmrlaif_jax.runtime import role_params, scoring, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Workload
from vlmrlaif_jax.stages.stage import PREFERENCES, Stage
from vlmrlaif_jax.stages.training import common
from vlmrlaif_jax.training.job import Hooks, TrainingJob

MAX_MEASURED_PAIRS = (
  64  # Held-out pairs that a reward model is measured on while it learns.
)


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
  check_holdout(config)
  if given.microbatches > 1 and given.centre_coef:
    raise UserError(
      f"--config.rm.centre_coef={given.centre_coef} needs the mean of a whole batch, "
      f"which {given.microbatches} microbatches do not have: set one of "
      "--config.rm.centre_coef=0 and --config.rm.microbatches=1"
    )


def check_holdout(config: ConfigDict) -> None:
  """Checks the share of videos that are held out."""
  if not 0 < config.rm.holdout < 1:
    raise UserError(
      f"--config.rm.holdout must be between 0 and 1, not {config.rm.holdout}"
    )


def make_job(run: Run, stage: str) -> TrainingJob:
  """Returns the job that trains the reward model's LoRA and head."""
  config, data = run.config.rm, run.config.data
  rows, start = config.batch_size, data.prompt_len
  # A prompt, a response and the reward prompt.
  time = start + data.response_len + len(scoring.encode_reward_prompt(run))
  learns = workloads.make_model_pass(
    run, "train", "reward", rows, time, config, start=start, group=2
  )
  return common.make_training_job(
    run,
    stage,
    method=method.make(config, MethodModels(reward_model=run.reward_model)),
    params={"reward": role_params.init_reward_model(run)},
    frozen={"reward": role_params.load_reward_model_base(run)},
    batch_spec=specs.pair_specs(run, rows, start, time - start),
    passes={UPDATE: [learns]},
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains on the preferences of `rm.preferences`, or of the label stage."""
  size, suffix = run.config.rm.batch_size, scoring.encode_reward_prompt(run)
  pairs, held = split_preference_pairs(run, log, least=size)
  job = make_job(run, stage)
  base = job.frozen["reward"]
  make = lambda rows: rewards.append_suffix(
    scoring.make_pairs_batch(run, pairs, rows), suffix
  )
  job = job._replace(
    data=common.make_batch_fn(run, len(pairs), size, make),
    hooks=_held_out(run, base, held),
  )
  state = common.fit_stage(run, log, job)
  accuracy = scoring.compute_pair_accuracy(
    run, merge_params(base, state.params["reward"]), held
  )
  log.print_note(
    f"rm: {accuracy:.1%} of {len(held)} held-out pairs are ranked as the judge did"
  )
  return {"pairs": len(pairs), "held_out": len(held), "held_out_accuracy": accuracy}


def split_preference_pairs(
  run: Run, log: StageLog, *, least: int
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
  """Returns the pairs to learn from and the pairs held out.

  Args:
    log: receives the problems of pairs that are left out.
    least: how many pairs there must be in all.
  """
  pairs = common.load_training_preferences(run, "rm", log, least=least)
  return pipeline.split_held_out(pairs, run.config.rm.holdout, run.config.seed)


def _held_out(run: Run, base: Params, held: Sequence[PreferenceExample]) -> Hooks:
  """Measures a reward model every so many steps, just before the last of them."""
  every = run.config.rm.measure_every
  measured: dict[str, float] = {}

  def before(step: int, params: Params) -> dict[str, Any]:
    measured.clear()
    if every and (step + 1) % every == 0:
      now = merge_params(base, params["reward"])
      right = scoring.compute_pair_accuracy(run, now, held[:MAX_MEASURED_PAIRS])
      measured["held_out_accuracy"] = right
    return {}

  return Hooks(before=before, on_step=lambda step, data, info: dict(measured))


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  data = run.config.data
  score = workloads.make_score_function(run, data.prompt_len + data.response_len, 0.0)
  return common.make_training_workload(run, stage, make_job(run, stage), last=[score])


STAGES = (
  Stage(
    name="rm",
    title="Reward model",
    section="rm",
    run=train,
    check=check,
    steps="steps",
    files={"preferences": PREFERENCES},
    workload=workload,
    paper="2402.03746",
  ),
)
