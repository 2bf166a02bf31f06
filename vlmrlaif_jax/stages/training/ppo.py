"""The stage `ppo`: PPO against the reward model (VLM-RLAIF, 2402.03746)."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_at_least, check_choices, user_errors
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Parts
from vlmrlaif_jax.losses.advantages import adapt_kl_coef
from vlmrlaif_jax.methods import ppo as method
from vlmrlaif_jax.runtime import answering, role_params, specs, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Workload
from vlmrlaif_jax.stages.stage import Rows, Stage
from vlmrlaif_jax.stages.training import common, oracles, rollouts
from vlmrlaif_jax.training.job import Hooks, StepOutput, TrainingJob


def default_config() -> ConfigDict:
  """Returns the settings of the section `ppo`."""
  return common.default_config(
    method.default_config(),
    critic_head="zero",  # Or "reward": the reward model's own.
    **rollouts.default_settings(),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `ppo`."""
  given = config.ppo
  with user_errors("ppo"):
    method.check(given)
    check_choices(given, {"critic_head": role_params.CRITIC_HEADS})
    check_at_least(given, {"samples": 1, "samples_every": 1, "epochs": 1})
    check_at_least(given, {"minibatches": 1, "slots": 0, "chunk": 1})
  common.check_training(config, "ppo", common.schedule_of(given))


def batches(config: ConfigDict) -> dict[str, Rows]:
  """Returns how responses and, while they are sampled, prompts are divided."""
  given = config.ppo
  # A row of an update is a response. Prompts are spread before there are `samples`.
  return {
    "ppo.batch_size (prompts)": Rows(given.batch_size),
    **common.training_rows(config, "ppo", per_row=given.samples),
  }


def make_job(run: Run) -> TrainingJob:
  """Returns the job that trains the policy's LoRA and the critic."""
  config, data = run.config.ppo, run.config.data
  params, frozen = role_params.ppo_roles(run, config.critic_head)
  rows = config.batch_size * config.samples
  time = data.prompt_len + data.response_len
  sampling = answering.Sampling(
    data.prompt_len, data.response_len, config.batch_size, samples=config.samples
  )
  whole = lambda phase, role, model, rows: workloads.model_pass(
    run, phase, role, model, rows, time, config, start=data.prompt_len
  )
  part = rows // config.minibatches
  return TrainingJob(
    method=method.make(
      config,
      Parts(
        policy=run.policy,
        critic=run.scorer,
        score=oracles.reward(run, config.stop_penalty, config.length_coef),
      ),
      max_new=data.response_len,
      **answering.token_ids(run),
    ),
    params=params,
    frozen=frozen | {"kl_coef": run.arrays.scalar(config.kl_coef)},
    batch_spec=specs.batch(run, config.batch_size, data.prompt_len),
    schedule=common.schedule_of(config),
    optimizer=config.optimizer,
    passes={
      "sample": workloads.sampling_passes(
        run, config.batch_size, sampling, slots=config.slots
      ),
      "score": [workloads.reward_pass(run, rows, time)],
      "weigh": [
        whole("forward", "policy", run.policy, rows),
        whole("forward", "ref", run.policy, rows),
        whole("forward", "critic", run.scorer, rows),
      ],
      UPDATE: [
        whole("train", "policy", run.policy, part),
        whole("train", "critic", run.scorer, part),
      ],
    },
    alarms=config.alarms,
    microbatches=config.microbatches,
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains policy and critic against the reward model."""
  config = run.config.ppo
  examples, rows, problems = common.encoded(
    run,
    run.splits.prompts,
    log,
    answered=False,
    prompt_len=run.config.data.prompt_len,
    response_len=0,
  )
  terms = oracles.reward_terms(run, config.stop_penalty, config.length_coef)
  record = rollouts.recorder(run, config, examples, log, terms)
  order = lambda step: common.order_of(run, len(examples), config.batch_size, step)
  job = make_job(run)._replace(
    data=lambda step: video.batch_of(run, examples, rows, order(step)),
    hooks=_hooks(config, record),
  )
  common.fit(run, stage, folder, log, job)
  return {"prompts": len(examples), "left_out": len(problems)}


def _hooks(
  config: ConfigDict, record: Callable[[int, dict], dict[str, float]]
) -> Hooks:
  """Records rollouts, and adapts the KL coefficient if `kl_target` is set."""
  now = {"kl_coef": config.kl_coef}
  frozen = lambda: {"kl_coef": jnp.float32(now["kl_coef"])}

  def on_step(step, batch, info):
    metrics = record(step, info)
    if config.kl_target:
      adapted = adapt_kl_coef(
        jnp.float32(now["kl_coef"]),
        info["kl"],
        target=config.kl_target,
        horizon=config.kl_horizon,
        rows=len(info["scores"]),
      )
      now["kl_coef"] = float(adapted)
    return StepOutput(frozen(), {**metrics, **now})

  def restored(extra):
    now.update(extra)
    return frozen()

  return Hooks(on_step=on_step, extra=lambda: dict(now), restored=restored)


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  return rollouts.workload(
    run, run.config.ppo, run.config.data.response_len, make_job(run)
  )


STAGES = (
  Stage(
    name="ppo",
    title="PPO",
    section="ppo",
    run=train,
    total_steps=lambda run: run.config.ppo.steps,
    check=check,
    batches=batches,
    lengths=lambda config: common.policy_lengths(config, "ppo"),
    schedule=lambda config: common.schedule_of(config.ppo),
    workload=workload,
    trains_policy=True,
    has_rollouts=True,
    paper="2402.03746",
  ),
)
