"""The stage `grpo`: compares the responses to a prompt with each other.

The oracle that scores or ranks a group is one of oracles.ORACLE_KINDS. With ranks, the
method is Oracle-RLAIF (2510.02561). With a generative reward model, it is Generative
RLHF-V (2505.18531). The stage `grm` trains a judge with the same functions.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_choices, user_errors
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import (
  MethodModels,
  Params,
  RemoteSampler,
  TrainState,
  merge_params,
)
from vlmrlaif_jax.data import records
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.rewards import ScoreFn
from vlmrlaif_jax.feedback.terms import scorer
from vlmrlaif_jax.methods import grpo as method
from vlmrlaif_jax.runtime import answering, rewarding, role_params, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, DeviceFunction, Workload
from vlmrlaif_jax.stages.stage import Stage, get_row_lengths
from vlmrlaif_jax.stages.training import common, oracles, rollouts
from vlmrlaif_jax.training import checkpoint
from vlmrlaif_jax.training.job import Hooks, TrainingJob

KL_ANCHORS = ("sft", "epoch_start")  # References of the KL penalty.


def default_config() -> ConfigDict:
  """Returns the settings of a section of GRPO."""
  return common.default_config(
    method.default_config(),
    oracle=oracles.default_config(),
    **rollouts.get_rollout_settings(),
  )


def check(config: ConfigDict, section: str = "grpo") -> None:
  """Checks a section of GRPO; raises UserError for an invalid value."""
  settings = config[section]
  with user_errors(section):
    method.check(settings)
    check_choices(settings, {"kl_anchor": KL_ANCHORS})
    oracles.check(settings.oracle)
    rollouts.check(settings)
  if settings.oracle.kind in oracles.REWARD_KINDS:
    with user_errors("reward"):
      scorer.check(config.reward)


def count_sampled_prompts(config: ConfigDict) -> int:
  """Returns the number of prompts that a step of a section of GRPO samples for."""
  return config.batch_size * config.oversample


def list_reward_sections(config: ConfigDict) -> tuple[str, ...]:
  """Returns the other sections that the stage reads."""
  is_read = "grpo" in config and config.grpo.oracle.kind in oracles.REWARD_KINDS
  return ("reward",) if is_read else ()


def make_job(
  run: Run,
  stage: str,
  score: ScoreFn | None = None,
  sampler: RemoteSampler | None = None,
) -> TrainingJob:
  """Returns the job that trains the policy's LoRA on groups of responses.

  Args:
    run: The run.
    stage: Name of the stage, which is also that of its section.
    score: Scores a batch of responses; see oracles.make_oracle. None for a plan.
    sampler: Samples the responses; None for the devices, and for a plan.
  """
  config = run.config[stage]
  params, frozen = role_params.make_policy_roles(
    run, role_params.JUDGE_STAGES[config.get("start", "sft")]
  )
  prompt_len, max_new = get_row_lengths(run.config, stage)
  prompts, time = config.batch_size, prompt_len + max_new
  sampled_prompts = count_sampled_prompts(config)
  make_pass = functools.partial(
    workloads.make_model_pass,
    run,
    time=time,
    config=config,
    start=prompt_len,
    group=config.samples,
  )
  sampling = answering.SamplingSettings(
    prompt_len, max_new, sampled_prompts, samples=config.samples
  )
  logps_roles = ("policy", "ref") if config.old_logps == "computed" else ("ref",)
  has_reward_model = oracles.needs_reward_model(run.config, config.oracle)
  planned_score, scoring = oracles.plan_scoring(
    run, sampled_prompts * config.samples, time, has_reward_model=has_reward_model
  )
  if has_reward_model:
    frozen["reward"] = role_params.load_reward_model(run)
  planned_sampler, sampling_passes = rollouts.plan_sampling(run, config, sampling)
  passes = {
    **sampling_passes,
    **scoring,
    "prepare_rollout": [make_pass("forward", role, prompts) for role in logps_roles],
    UPDATE: [make_pass("train", "policy", prompts // config.minibatches)],
  }
  score, sampler = score or planned_score, sampler or planned_sampler
  parts = MethodModels(policy=run.policy, score=score, sampler=sampler)
  ids = answering.get_token_ids(run)
  return common.make_training_job(
    run,
    stage,
    method=method.make(config, parts, max_new=max_new, **ids),
    params=params,
    frozen=frozen,
    batch_spec=specs.batch_specs(run, sampled_prompts, prompt_len),
    passes=passes,
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains the policy with an oracle that compares its responses to each prompt."""
  examples, problems = train_groups(run, stage, folder, log, run.splits.prompts)
  return {"prompts": len(examples), "left_out": len(problems)}


def train_groups(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog, prompts: Sequence[Example]
) -> tuple[list[Example], list[records.SkippedRecord]]:
  """Trains on groups of responses that the section's oracle scores.

  The section of the config has the name of the stage.

  Returns:
    The examples of `prompts` that fit, and the skipped records.
  """
  config = run.config[stage]
  size = count_sampled_prompts(config)
  examples, rows, problems = common.tokenize_for_stage(
    run, stage, prompts, log, answered=False
  )
  oracle = oracles.make_oracle(run, config.oracle, examples, folder)
  max_new = get_row_lengths(run.config, stage)[1]
  sampler = rollouts.make_rollout_sampler(run, config, max_new, folder)
  job = make_job(run, stage, oracle.score, sampler)
  refresh: Callable[[int, Params], Params] = lambda step, params: {}
  if config.kl_anchor == "epoch_start":
    every = max(len(examples) // size, 1)
    refresh = _make_reference_hook(job.frozen["policy"], job.params, folder, every)

  def before(step: int, params: Params) -> Params:
    # The oracle needs the examples of the batch.
    indices = common.batch_indices(run, len(examples), size, step)
    return {"example_ids": indices, **refresh(step, params)}

  record = rollouts.make_recorder(run, config, examples, log, oracle, prompts=size)
  data = common.make_example_batch_fn(run, examples, rows, size)
  common.fit_stage(run, log, job._replace(hooks=Hooks(before, record), data=data))
  return examples, problems


def _make_reference_hook(
  base: Params, like: Params, folder: pathlib.Path, every: int
) -> Callable[[int, Params], Params]:
  """Returns a hook that replaces the reference by the policy every `every` steps.

  Each reference is saved, and every run restores it from disk. A resumed run finds the
  reference of its first step there.
  """
  loaded = set()

  def before(step, params):
    start = step - step % every
    if start in loaded:
      return {}
    path = str(folder / "anchor" / str(start))
    if step == start and checkpoint.get_latest_step(path) is None:
      state = TrainState(np.array(step, np.int32), params, ())
      checkpoint.save_train_state(path, state, step, keep=1)
    loaded.add(start)
    return {
      "ref": merge_params(base, checkpoint.restore_saved_params(path, like)["policy"])
    }

  return before


# Planning.


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of a stage of GRPO."""
  config, job = run.config[stage], make_job(run, stage)
  return common.make_training_workload(
    run,
    stage,
    job,
    first=_make_judge_functions(run, config),
    rows=count_sampled_prompts(config),
  )


def _make_judge_functions(run: Run, config: ConfigDict) -> list[DeviceFunction]:
  """Returns the device functions of an oracle that scores on the host."""
  oracle, prompts = config.oracle, count_sampled_prompts(config)
  rows = prompts * config.samples
  if oracle.kind in oracles.REWARD_KINDS:
    return rewarding.plan_self_judge(run, rows)
  if oracle.judge == "endpoint":
    return []
  queries = {
    "list": prompts,
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
    reads=list_reward_sections,
    workload=workload,
    trains_policy=True,
    has_rollouts=True,
    paper="2510.02561",
  ),
)
