"""The stage `grpo`: responses to a prompt are compared with each other.

The oracle that scores or ranks a group is one of oracles.KINDS. With ranks it is
Oracle-RLAIF (2510.02561); with a generative reward model, Generative RLHF-V
(2505.18531). The stage `grm` (generative_rm.py) trains a judge with the same functions.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_choices, user_errors
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import MethodModels, Params, TrainState, merge_params
from vlmrlaif_jax.data import records
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.rewards import ScoreFn
from vlmrlaif_jax.methods import grpo as method
from vlmrlaif_jax.runtime import answering, role_params, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, DeviceFunction, Workload
from vlmrlaif_jax.stages.stage import Stage, get_row_lengths
from vlmrlaif_jax.stages.training import common, oracles, rollouts
from vlmrlaif_jax.training import checkpoint
from vlmrlaif_jax.training.job import Hooks, TrainingJob

KL_ANCHORS = ("sft", "epoch_start")


def default_config() -> ConfigDict:
  """Returns the settings of a section of GRPO on groups of responses."""
  return common.default_config(
    method.default_config(),
    oracle=oracles.default_config(),
    **rollouts.get_rollout_settings(),
  )


def check(config: ConfigDict, section: str = "grpo") -> None:
  """Checks a section of GRPO on groups of responses."""
  given = config[section]
  with user_errors(section):
    method.check(given)
    check_choices(given, {"kl_anchor": KL_ANCHORS})
    oracles.check(given.oracle)


def _score_on_host(frozen, batch):
  """Stands for an oracle that reads texts: its scores come from the host."""
  rows = len(batch.tokens)
  return jnp.zeros(rows), jnp.ones(rows, bool)


def make_job(run: Run, stage: str, score: ScoreFn | None = None) -> TrainingJob:
  """Returns the job that trains the policy's LoRA on groups of responses.

  Args:
    stage: the stage, which is named as its section of the config.
    score: scores a batch of responses; see oracles.make. None, for a plan: the reward
      model's scores, or a stand-in for those that come from the host.
  """
  config = run.config[stage]
  params, frozen = role_params.make_policy_roles(
    run, role_params.JUDGE_STAGES[config.get("start", "sft")]
  )
  prompt_len, max_new = get_row_lengths(run.config, stage)
  prompts, time = config.batch_size, prompt_len + max_new
  read = functools.partial(
    workloads.make_model_pass,
    run,
    time=time,
    config=config,
    start=prompt_len,
    group=config.samples,
  )
  sampling = answering.SamplingSettings(
    prompt_len, max_new, prompts, samples=config.samples
  )
  weighed = ("policy", "ref") if config.old_logps == "computed" else ("ref",)
  passes = {
    "sample": workloads.make_sampling_passes(
      run, prompts, sampling, slots=config.slots
    ),
    "prepare_rollout": [read("forward", role, prompts) for role in weighed],
    UPDATE: [read("train", "policy", prompts // config.minibatches)],
  }
  by_reward = config.oracle.kind == "reward"
  if by_reward:
    frozen["reward"] = role_params.load_reward_model(run)
    passes["score"] = [workloads.make_reward_pass(run, prompts * config.samples, time)]
  if score is None:
    score = _score_on_host
    if by_reward:
      score = jax.jit(oracles.make_reward_oracle(run, config.oracle).score)
  parts, ids = (
    MethodModels(policy=run.policy, score=score),
    answering.get_token_ids(run),
  )
  return common.make_training_job(
    run,
    stage,
    method=method.make(config, parts, max_new=max_new, **ids),
    params=params,
    frozen=frozen,
    batch_spec=specs.batch_specs(run, prompts, prompt_len),
    passes=passes,
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains the policy against an oracle that compares its responses to each prompt."""
  examples, problems = train_groups(run, stage, folder, log, run.splits.prompts)
  return {"prompts": len(examples), "left_out": len(problems)}


def train_groups(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog, asked: Sequence[Example]
) -> tuple[list[Example], list[records.SkippedRecord]]:
  """Trains on groups of responses that the section's oracle scores.

  Args:
    stage: the stage, which is named as its section of the config.
    asked: examples whose questions are the prompts.

  Returns:
    The examples that fit, and problems of the others.
  """
  config, size = run.config[stage], run.config[stage].batch_size
  examples, rows, problems = common.tokenize_for_stage(
    run, stage, asked, log, answered=False
  )
  oracle = oracles.make_oracle(run, config.oracle, examples, folder)
  job = make_job(run, stage, oracle.score)
  renew: Callable[[int, Params], Params] = lambda step, params: {}
  if config.kl_anchor == "epoch_start":
    every = max(len(examples) // size, 1)
    renew = _refresh_reference(job.frozen["policy"], job.params, folder, every)

  def before(step: int, params: Params) -> Params:
    # The oracle reads which examples a batch asks about.
    asked = common.batch_indices(run, len(examples), size, step)
    return {"example_ids": asked, **renew(step, params)}

  record = rollouts.make_recorder(run, config, examples, log, oracle)
  data = common.make_example_batch_fn(run, examples, rows, size)
  common.fit_stage(run, log, job._replace(hooks=Hooks(before, record), data=data))
  return examples, problems


def _refresh_reference(
  base: Params, like: Params, folder: pathlib.Path, every: int
) -> Callable[[int, Params], Params]:
  """Returns a hook that makes the policy its own reference every so many steps.

  Each reference is saved, and read from disk by every run. A run that was killed finds
  the reference of the step that it resumes from.
  """
  current = set()

  def before(step, params):
    start = step - step % every
    if start in current:
      return {}
    at = str(folder / "anchor" / str(start))
    if step == start and checkpoint.get_latest_step(at) is None:
      state = TrainState(np.array(step, np.int32), params, ())
      checkpoint.save_checkpoint(at, state, step, keep=1)
    current.add(start)
    return {
      "ref": merge_params(base, checkpoint.restore_saved_params(at, like)["policy"])
    }

  return before


# What it runs on the devices.


def workload(run: Run, stage: str) -> Workload:
  """Returns what a stage of GRPO runs; it is named as its section of the config."""
  config, job = run.config[stage], make_job(run, stage)
  time = sum(get_row_lengths(run.config, stage))
  return common.make_training_workload(
    run, stage, job, first=_judging(run, config, time)
  )


def _judging(run: Run, config: ConfigDict, time: int) -> list[DeviceFunction]:
  """Returns the functions by which an oracle of the host uses the devices."""
  oracle, rows = config.oracle, config.batch_size * config.samples
  if oracle.kind == "reward_rank":
    return [workloads.make_score_function(run, time, rows)]
  if oracle.judge == "endpoint":
    return []
  queries = {
    "list": config.batch_size,
    "pairs": rows * (config.samples - 1),
    "grm": rows * (config.samples - 1) // (1 if oracle.both_orders else 2),
  }
  if oracle.kind not in queries:
    return []
  return [workloads.make_judge_function(run, oracle, queries[oracle.kind])]


STAGES = (
  Stage(
    name="grpo",
    title="GRPO",
    section="grpo",
    run=train,
    check=check,
    steps="steps",
    workload=workload,
    trains_policy=True,
    has_rollouts=True,
    paper="2510.02561",
  ),
)
