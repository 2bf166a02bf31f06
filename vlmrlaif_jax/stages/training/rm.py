"""The stage `rm`: trains a reward model on preferences."""

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

MAX_MEASURED_PAIRS = 64  # Held-out pairs in a measurement during training.


def default_config() -> ConfigDict:
  """Returns the settings of the section `rm`."""
  return common.default_config(
    method.default_config(),
    preferences="",  # File of preferences; "": those of the label stage.
    holdout=0.15,  # Share of the videos that are held out.
    # Steps between two measurements; 0: at the end only.
    measure_every=placeholder(int),
    steps=placeholder(int),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `rm`; raises UserError for an invalid value."""
  section = config.rm
  with user_errors("rm"):
    check_at_least(section, {"measure_every": 0, "margin": 0, "centre_coef": 0})
  check_holdout(config)
  if section.microbatches > 1 and section.centre_coef:
    raise UserError(
      f"--config.rm.centre_coef={section.centre_coef} needs the mean of a whole batch, "
      f"but --config.rm.microbatches={section.microbatches}: set one of "
      "--config.rm.centre_coef=0 and --config.rm.microbatches=1"
    )


def check_holdout(config: ConfigDict) -> None:
  """Checks the share of held-out videos; raises UserError if it is invalid."""
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
  update_pass = workloads.make_model_pass(
    run, "train", "reward", rows, time, config, start=start, group=2
  )
  return common.make_training_job(
    run,
    stage,
    method=method.make(config, MethodModels(reward_model=run.reward_model)),
    params={"reward": role_params.init_reward_model(run)},
    frozen={"reward": role_params.load_reward_model_base(run)},
    batch_spec=specs.pair_specs(run, rows, start, time - start),
    passes={UPDATE: [update_pass]},
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains on the preferences of `rm.preferences`, else of the label stage."""
  size, suffix = run.config.rm.batch_size, scoring.encode_reward_prompt(run)
  pairs, held_out = split_preference_pairs(run, log, min_count=size)
  job = make_job(run, stage)
  base = job.frozen["reward"]
  make = lambda rows: rewards.append_suffix(
    scoring.make_pairs_batch(run, pairs, rows), suffix
  )
  job = job._replace(
    data=common.make_batch_fn(run, len(pairs), size, make),
    hooks=_make_accuracy_hooks(run, base, held_out),
  )
  state = common.fit_stage(run, log, job)
  accuracy = scoring.compute_pair_accuracy(
    run, merge_params(base, state.params["reward"]), held_out
  )
  log.print_note(f"rm: accuracy on {len(held_out)} held-out pairs is {accuracy:.1%}")
  return {"pairs": len(pairs), "held_out": len(held_out), "held_out_accuracy": accuracy}


def split_preference_pairs(
  run: Run, log: StageLog, *, min_count: int
) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
  """Returns the training pairs and the held-out pairs.

  Raises:
    UserError: There are fewer than `min_count` pairs in total, or all are held out.
  """
  pairs = common.load_training_preferences(run, "rm", log, min_count=min_count)
  return pipeline.split_for_training(
    pairs, run.config.rm.holdout, run.config.seed, "rm.holdout"
  )


def _make_accuracy_hooks(
  run: Run, base: Params, held_out: Sequence[PreferenceExample]
) -> Hooks:
  """Returns hooks that measure the reward model every `measure_every` steps."""
  every = run.config.rm.measure_every
  measured: dict[str, float] = {}

  def before(step: int, params: Params) -> dict[str, Any]:
    measured.clear()
    if every and (step + 1) % every == 0:
      variables = merge_params(base, params["reward"])
      pairs = held_out[:MAX_MEASURED_PAIRS]
      accuracy = scoring.compute_pair_accuracy(run, variables, pairs)
      measured["held_out_accuracy"] = accuracy
    return {}

  return Hooks(before_step=before, after_step=lambda step, data, info: dict(measured))


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of the stage."""
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
