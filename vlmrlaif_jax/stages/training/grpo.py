"""The stage `grpo`: responses to a prompt are compared with each other.

The oracle that scores or ranks a group is one of oracles.KINDS. With ranks it is
Oracle-RLAIF (2510.02561); with a generative reward model, Generative RLHF-V
(2505.18531). The stage `grm` (generative_rm.py) trains a judge with the same functions.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_choices, user_errors
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Collect, Frozen, Params, Parts, TrainState, join
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.methods import grpo as method
from vlmrlaif_jax.runtime import answering, role_params, specs, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Function, Workload
from vlmrlaif_jax.stages.stage import Stage, row_lengths
from vlmrlaif_jax.stages.training import common, oracles, rollouts
from vlmrlaif_jax.training import checkpoint
from vlmrlaif_jax.training.job import Hooks, TrainingJob

KL_ANCHORS = ("sft", "epoch_start")


def default_config() -> ConfigDict:
  """Returns the settings of a section of GRPO on groups of responses."""
  return common.default_config(
    method.default_config(),
    oracle=oracles.default_config(),
    **rollouts.default_settings(),
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


def make_job(run: Run, stage: str, score: oracles.Score | None = None) -> TrainingJob:
  """Returns the job that trains the policy's LoRA on groups of responses.

  Args:
    run: the run.
    stage: the stage, which is named as its section of the config.
    score: scores a batch of responses; see oracles.make. None, for a plan: the reward
      model's scores, or a stand-in for those that come from the host.
  """
  config = run.config[stage]
  params, frozen = role_params.policy_roles(
    run, role_params.JUDGES[config.get("start", "sft")]
  )
  prompt_len, max_new = row_lengths(run.config, stage)
  prompts, time = config.batch_size, prompt_len + max_new
  read = functools.partial(
    workloads.model_pass,
    run,
    time=time,
    config=config,
    start=prompt_len,
    group=config.samples,
  )
  sampling = answering.Sampling(prompt_len, max_new, prompts, samples=config.samples)
  weighed = ("policy", "ref") if config.old_logps == "computed" else ("ref",)
  passes = {
    "sample": workloads.sampling_passes(run, prompts, sampling, slots=config.slots),
    "weigh": [read("forward", role, prompts) for role in weighed],
    UPDATE: [read("train", "policy", prompts // config.minibatches)],
  }
  by_reward = config.oracle.kind == "reward"
  if by_reward:
    frozen["reward"] = role_params.reward_variables(run)
    passes["score"] = [workloads.reward_pass(run, prompts * config.samples, time)]
  if score is None:
    score = oracles.reward_score(run, config.oracle) if by_reward else _score_on_host
  return common.job_of(
    run,
    stage,
    method=method.make(
      config,
      Parts(policy=run.policy, score=score),
      max_new=max_new,
      **answering.token_ids(run),
    ),
    params=params,
    frozen=frozen,
    batch_spec=specs.batch(run, prompts, prompt_len),
    passes=passes,
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the policy against an oracle that compares its responses to each prompt."""
  prompts = run.splits.prompts
  examples, rows, problems = common.encoded(run, stage, prompts, log, answered=False)
  train_groups(run, stage, folder, log, examples, rows)
  return {"prompts": len(examples), "left_out": len(problems)}


def train_groups(
  run: Run,
  stage: str,
  folder: pathlib.Path,
  log: Log,
  examples: Sequence[Example],
  rows: tokenization.Rows,
) -> TrainState:
  """Trains on groups of responses that the section's oracle scores.

  Args:
    run: the run.
    stage: the stage, which is named as its section of the config.
    folder: its folder.
    log: its log.
    examples: those whose questions are the prompts.
    rows: the prompts of the examples.
  """
  config, size = run.config[stage], run.config[stage].batch_size
  oracle = oracles.make(run, config.oracle, examples, folder)
  job = make_job(run, stage, oracle.score)

  def data(step):
    order = common.order_of(run, len(examples), size, step)
    return video.batch_of(run, examples, rows, order), order

  record = rollouts.recorder(run, config, examples, log, oracle.terms, oracle.said)
  # Nothing is scored between a rollout and its hook.
  on_step = lambda step, data, info: record(step, data, info) | oracle.told()
  hooks = Hooks(on_step=on_step)
  if config.kl_anchor == "epoch_start":
    every = max(len(examples) // size, 1)
    renew = _refresh_reference(job.frozen["policy"], job.params, folder, every)
    hooks = hooks._replace(before=renew)
  learned = job.method._replace(collect=_with_numbers(job.method.collect))
  return common.fit(
    run, stage, folder, log, job._replace(method=learned, hooks=hooks, data=data)
  )


def _with_numbers(collect: Collect) -> Collect:
  """Returns a method's collect that puts the numbers of a batch's examples in frozen.

  The oracle reads in frozen["asked"] which examples a batch asks about.
  """

  def begin(key, params, frozen, data):
    batch, numbers = data
    return collect.begin(key, params, frozen, batch), numbers

  def finish(params, frozen, begun, phase):
    sampled, numbers = begun
    return collect.finish(params, Frozen({**frozen, "asked": numbers}), sampled, phase)

  return Collect(begin, finish)


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
      checkpoint.save(at, state, step, keep=1)
    current.add(start)
    return {"ref": join(base, checkpoint.restore_params(at, like)["policy"])}

  return before


# What it runs on the devices.


def workload(run: Run, stage: str) -> Workload:
  """Returns what a stage of GRPO runs; it is named as its section of the config."""
  config, job = run.config[stage], make_job(run, stage)
  time = sum(row_lengths(run.config, stage))
  return common.job_workload(run, config, job, first=_judging(run, config, time))


def _judging(run: Run, config: ConfigDict, time: int) -> list[Function]:
  """Returns the functions by which an oracle of the host uses the devices."""
  oracle, rows = config.oracle, config.batch_size * config.samples
  if oracle.kind == "scorer":
    return [workloads.score(run, time, rows)]
  if oracle.judge == "endpoint":
    return []
  queries = {
    "list": config.batch_size,
    "pairs": rows * (config.samples - 1),
    "grm": rows * (config.samples - 1) // (1 if oracle.both_orders else 2),
  }
  if oracle.kind not in queries:
    return []
  return [workloads.judge(run, oracle, queries[oracle.kind])]


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
