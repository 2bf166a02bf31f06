"""The stage `ppo`: PPO with a reward model (VLM-RLAIF, 2402.03746)."""

import functools
import pathlib
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_choices, user_errors
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import MethodModels, RemoteSampler
from vlmrlaif_jax.feedback.rewards import ScoreFn
from vlmrlaif_jax.feedback.terms import scorer
from vlmrlaif_jax.methods import ppo as method
from vlmrlaif_jax.runtime import answering, rewarding, role_params, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Workload
from vlmrlaif_jax.stages.stage import RowSplit, Stage
from vlmrlaif_jax.stages.training import common, oracles, rollouts
from vlmrlaif_jax.training.job import Hooks, TrainingJob


def default_config() -> ConfigDict:
  """Returns the settings of the section `ppo`."""
  return common.default_config(
    method.default_config(),
    # Initial head: "zero", or "reward" for that of the reward model.
    critic_head="zero",
    **rollouts.get_rollout_settings(),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `ppo`; raises UserError for an invalid value."""
  with user_errors("ppo"):
    method.check(config.ppo)
    rollouts.check(config.ppo)
    check_choices(config.ppo, {"critic_head": role_params.CRITIC_HEADS})
    if config.ppo.critic_head == "reward" and not scorer.has_model_term(config.reward):
      raise ValueError(
        "critic_head='reward' requires the head of a reward model, but reward.terms "
        "has none: set --config.ppo.critic_head=zero"
      )
  with user_errors("reward"):
    scorer.check(config.reward)
    if config.reward.combine == "group":
      raise ValueError(
        "combine='group' normalizes within groups, which PPO does not have: set "
        "--config.reward.combine=sum"
      )
    name = scorer.find_group_term(config.reward)
    if name and config.ppo.samples == 1:
      raise ValueError(
        f"terms.{name} compares the responses to one prompt, but PPO samples one: set "
        f"--config.ppo.samples=4, or --config.reward.terms.{name}.weight=0"
      )


def get_batch_rows(config: ConfigDict) -> dict[str, RowSplit]:
  """Returns the split of responses and of the prompts that they are sampled for."""
  section = config.ppo
  # A row of an update is a response. During sampling, a row is a prompt.
  return {
    "ppo.batch_size (prompts)": RowSplit(section.batch_size),
    "ppo.batch_size": RowSplit(
      section.batch_size * section.samples, section.microbatches * section.minibatches
    ),
  }


def make_job(
  run: Run,
  stage: str,
  score: ScoreFn | None = None,
  sampler: RemoteSampler | None = None,
) -> TrainingJob:
  """Returns the job that trains the policy's LoRA and the critic.

  Args:
    run: The run.
    stage: Name of the stage.
    score: Scores a batch of responses; see oracles.make_reward_oracle. None for a plan.
    sampler: Samples the responses; None for the devices, and for a plan.
  """
  config, data = run.config.ppo, run.config.data
  has_reward_model = scorer.has_model_term(run.config.reward)
  params, frozen = role_params.make_ppo_roles(
    run, config.critic_head, has_reward_model=has_reward_model
  )
  prompts, start, max_new = config.batch_size, data.prompt_len, data.response_len
  rows, time = prompts * config.samples, start + max_new
  sampling = answering.SamplingSettings(start, max_new, prompts, samples=config.samples)
  make_pass = functools.partial(
    workloads.make_model_pass, run, time=time, config=config, start=start
  )
  update_rows = rows // config.minibatches
  planned_score, scoring = oracles.plan_scoring(
    run, rows, time, has_reward_model=has_reward_model
  )
  planned_sampler, sampling_passes = rollouts.plan_sampling(run, config, sampling)
  parts = MethodModels(
    policy=run.policy,
    critic=run.reward_model,
    score=score or planned_score,
    sampler=sampler or planned_sampler,
  )
  ids = answering.get_token_ids(run)
  return common.make_training_job(
    run,
    stage,
    method=method.make(config, parts, max_new=max_new, **ids),
    params=params,
    frozen=frozen,
    batch_spec=specs.batch_specs(run, prompts, start),
    passes={
      **sampling_passes,
      **scoring,
      "prepare_rollout": [
        make_pass("forward", each, rows) for each in ("policy", "ref", "critic")
      ],
      UPDATE: [make_pass("train", role, update_rows) for role in ("policy", "critic")],
    },
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains policy and critic on the reward that the section `reward` gives."""
  config, prompts = run.config.ppo, run.splits.prompts
  examples, rows, problems = common.tokenize_for_stage(
    run, "ppo", prompts, log, answered=False
  )
  oracle = oracles.make_reward_oracle(run, examples, folder)
  size = config.batch_size
  # The oracle needs the examples of the batch.
  before = lambda step, params: {
    "example_ids": common.batch_indices(run, len(examples), size, step)
  }
  record = rollouts.make_recorder(run, config, examples, log, oracle, prompts=size)
  sampler = rollouts.make_rollout_sampler(
    run, config, run.config.data.response_len, folder
  )
  job = make_job(run, stage, oracle.score, sampler)._replace(
    data=common.make_example_batch_fn(run, examples, rows, size),
    hooks=Hooks(before, record),
  )
  common.fit_stage(run, log, job)
  return {"prompts": len(examples), "left_out": len(problems)}


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of the stage."""
  rows = run.config.ppo.batch_size * run.config.ppo.samples
  first = rewarding.plan_self_judge(run, rows)
  return common.make_training_workload(run, stage, make_job(run, stage), first=first)


STAGES = (
  Stage(
    name="ppo",
    title="PPO",
    section="ppo",
    run=train,
    check=check,
    steps="steps",
    reads=lambda config: ("reward",),
    batches=get_batch_rows,
    workload=workload,
    trains_policy=True,
    has_rollouts=True,
    paper="2402.03746",
  ),
)
