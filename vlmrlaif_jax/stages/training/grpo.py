"""The stage `grpo`: responses to a prompt are compared with each other.

The oracle that scores or ranks a group is one of oracles.KINDS. With ranks it is
Oracle-RLAIF (2510.02561); with a generative reward model, Generative RLHF-V
(2505.18531).
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_at_least, check_choices, user_errors
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Collect, Frozen, Params, Parts, TrainState, join
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.methods import grpo as method
from vlmrlaif_jax.runtime import answering, role_params, specs, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Function, Workload
from vlmrlaif_jax.stages.stage import Stage
from vlmrlaif_jax.stages.training import common, oracles, rollouts
from vlmrlaif_jax.training import checkpoint
from vlmrlaif_jax.training.job import Hooks, StepOutput, TrainingJob

KL_ANCHORS = ("sft", "epoch_start")


def default_config() -> ConfigDict:
  """Returns the settings of a section of GRPO on groups of responses."""
  return common.default_config(
    method.default_config(),
    oracle=oracles.default_config(),
    **rollouts.default_settings(),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `grpo`."""
  check_groups(config, "grpo")


def check_groups(config: ConfigDict, section: str) -> None:
  """Checks a section of GRPO on groups of responses."""
  given = config[section]
  with user_errors(section):
    method.check(given)
    check_choices(given, {"kl_anchor": KL_ANCHORS})
    check_at_least(given, {"samples_every": 1, "epochs": 1, "minibatches": 1})
    check_at_least(given, {"slots": 0, "chunk": 1})
    oracles.check(given.oracle)
  common.check_training(config, section, common.schedule_of(given))


def make_job(
  run: Run,
  config: ConfigDict,
  start: str,
  prompt_len: int,
  max_new: int,
  score: oracles.Score,
) -> TrainingJob:
  """Returns the job that trains the policy's LoRA on groups of responses.

  Args:
    config: the section of the stage.
    start: the stage whose policy it starts from.
    prompt_len: tokens of a prompt.
    max_new: greatest length of a response, in tokens.
    score: scores a batch of responses; see oracles.make.
  """
  params, frozen = role_params.policy_roles(run, start)
  by_reward = config.oracle.kind == "reward"
  if by_reward:
    frozen["reward"] = role_params.reward_variables(run)
  prompts, time = config.batch_size, prompt_len + max_new
  group = lambda phase, role, rows: workloads.model_pass(
    run,
    phase,
    role,
    run.policy,
    rows,
    time,
    config,
    start=prompt_len,
    group=config.samples,
  )
  weigh = [group("forward", "ref", prompts)]
  if config.old_logps == "computed":
    weigh.insert(0, group("forward", "policy", prompts))
  sampling = answering.Sampling(prompt_len, max_new, prompts, samples=config.samples)
  passes = {
    "sample": workloads.sampling_passes(run, prompts, sampling, slots=config.slots),
    "weigh": weigh,
    UPDATE: [group("train", "policy", prompts // config.minibatches)],
  }
  if by_reward:
    passes["score"] = [workloads.reward_pass(run, prompts * config.samples, time)]
  return TrainingJob(
    method=method.make(
      config,
      Parts(policy=run.policy, score=score),
      max_new=max_new,
      **answering.token_ids(run),
    ),
    params=params,
    frozen=frozen,
    batch_spec=specs.batch(run, prompts, prompt_len),
    schedule=common.schedule_of(config),
    optimizer=config.optimizer,
    passes=passes,
    alarms=config.alarms,
    microbatches=config.microbatches,
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the policy against an oracle that compares its responses to each prompt."""
  data = run.config.data
  examples, rows, problems = common.encoded(
    run,
    run.splits.prompts,
    log,
    answered=False,
    prompt_len=data.prompt_len,
    response_len=0,
  )
  train_groups(
    run,
    stage,
    folder,
    log,
    run.config.grpo,
    examples,
    rows,
    start=role_params.SFT[1],
    prompt_len=data.prompt_len,
    max_new=data.response_len,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def train_groups(
  run: Run,
  stage: str,
  folder: pathlib.Path,
  log: Log,
  config: ConfigDict,
  examples: Sequence[Example],
  rows: tokenization.Rows,
  *,
  start: str,
  prompt_len: int,
  max_new: int,
) -> TrainState:
  """Trains on groups of responses that `config.oracle` scores.

  Args:
    examples: those whose questions are the prompts.
    rows: the prompts of the examples.
    start, prompt_len, max_new: see make_job.
  """
  oracle = oracles.make(run, config.oracle, examples, folder)
  job = make_job(run, config, start, prompt_len, max_new, oracle.score)
  scored = _ScoredCollect(job.method.collect, oracle)

  def data(step):
    order = common.order_of(run, len(examples), config.batch_size, step)
    return video.batch_of(run, examples, rows, order), order

  record = rollouts.recorder(
    run, config, examples, log, oracle.terms, lambda: scored.said
  )
  on_step = lambda step, batch, info: StepOutput(
    {}, {**record(step, info), **scored.metrics}
  )
  hooks = Hooks(on_step=on_step)
  if config.kl_anchor == "epoch_start":
    every = max(len(examples) // config.batch_size, 1)
    renew = _refresh_reference(job.frozen["policy"], job.params, folder, every)
    hooks = hooks._replace(before=renew)
  collect = Collect(scored.begin, scored.finish)
  job = job._replace(
    method=job.method._replace(collect=collect), hooks=hooks, data=data
  )
  return common.fit(run, stage, folder, log, job)


class _ScoredCollect:
  """A method's collect, whose oracle reads which examples a batch asks about.

  It keeps what the oracle returns next to the scores of the last rollout.
  """

  def __init__(self, collect: Collect, oracle: oracles.Oracle):
    self._collect, self._oracle = collect, oracle
    self.metrics: dict[str, float] = {}
    self.said: oracles.Said = oracles.SILENT

  def begin(self, key, params, frozen, data):
    batch, numbers = data
    return self._collect.begin(key, params, frozen, batch), numbers

  def finish(self, params, frozen, begun, phase):
    sampled, numbers = begun
    frozen = Frozen({**frozen, "asked": numbers})
    rollout = self._collect.finish(params, frozen, sampled, phase)
    self.metrics, self.said = self._oracle.told(), self._oracle.said()
    return rollout


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
    if step == start and checkpoint.latest_step(at) is None:
      state = TrainState(np.array(step, np.int32), params, ())
      checkpoint.save(at, state, step, extra={}, keep=1)
    current.add(start)
    return {"ref": join(base, checkpoint.restore_params(at, like)["policy"])}

  return before


# What it runs on the devices.


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  data = run.config.data
  start = role_params.SFT[1]
  return group_workload(run, run.config.grpo, start, data.prompt_len, data.response_len)


def group_workload(
  run: Run, config: ConfigDict, start: str, prompt_len: int, max_new: int
) -> Workload:
  """Returns what a stage of GRPO runs; see make_job for the arguments."""
  score: oracles.Score = _score_on_host
  if config.oracle.kind == "reward":
    score = oracles.reward_score(run, config.oracle)
  job = make_job(run, config, start, prompt_len, max_new, score)
  judging = _judging(run, config, prompt_len + max_new)
  return rollouts.workload(run, config, max_new, job, judging)


def _score_on_host(frozen, batch):
  """Stands for an oracle that reads texts: its scores come from the host."""
  rows = len(batch.tokens)
  return jnp.zeros(rows), jnp.ones(rows, bool)


def _judging(run: Run, config: ConfigDict, time: int) -> list[Function]:
  """Returns the functions by which an oracle of the host uses the devices."""
  oracle, rows = config.oracle, config.batch_size * config.samples
  asks = functools.partial(workloads.judge, run, oracle)
  if oracle.kind == "scorer":
    return [workloads.score(run, time, rows)]
  if oracle.judge == "endpoint":
    return []
  queries = {
    "list": config.batch_size,
    "pairs": rows * (config.samples - 1),
    "grm": rows * (config.samples - 1) // (1 if oracle.both_orders else 2),
  }
  return [asks(queries[oracle.kind])] if oracle.kind in queries else []


STAGES = (
  Stage(
    name="grpo",
    title="GRPO",
    section="grpo",
    run=train,
    total_steps=lambda run: run.config.grpo.steps,
    check=check,
    batches=lambda config: common.training_rows(config, "grpo"),
    lengths=lambda config: common.policy_lengths(config, "grpo"),
    schedule=lambda config: common.schedule_of(config.grpo),
    workload=workload,
    trains_policy=True,
    has_rollouts=True,
    paper="2510.02561",
  ),
)
