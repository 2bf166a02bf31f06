"""PROGRAM: the stages that train on what the policy samples: PPO, GRPO."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import (
  Collect,
  Frozen,
  Method,
  Params,
  Parts,
  TrainState,
  join,
)
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.losses.advantages import adapt_kl_coef
from vlmrlaif_jax.methods import grpo as grpo_method
from vlmrlaif_jax.methods import ppo as ppo_method
from vlmrlaif_jax.runtime import answering, role_params
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import common, oracles, rollout_samples
from vlmrlaif_jax.training import checkpoint, loop


def ppo(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains policy and critic against the reward model."""
  config = run.config.ppo
  examples, rows, problems = common.encoded(
    run, run.splits.prompts, log, answered=False, response_len=0
  )
  params, frozen = role_params.ppo_roles(run, config.critic_head)
  method = make_ppo(run, config)
  data = lambda step: common.batch_of(run, examples, rows, config.batch_size, step)
  terms = oracles.reward_terms(run, config.stop_penalty, config.length_coef)
  show = lambda sampled: rollout_samples.rows(run, sampled, terms)
  key = common.key_of(run, stage)
  again = rollout_samples.Again(run, config, examples, method.collect, data, key, show)
  common.fit(
    run,
    stage,
    folder,
    log,
    config,
    method,
    steps=config.steps,
    params=params,
    frozen=frozen | {"kl_coef": jnp.float32(config.kl_coef)},
    data=data,
    hooks=_ppo_hooks(run, config, examples, log, show, again),
    epochs=config.epochs,
    minibatches=config.minibatches,
    one_step_off=config.one_step_off,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def grpo(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the policy against an oracle that compares its responses to each prompt."""
  examples, rows, problems = common.encoded(
    run, run.splits.prompts, log, answered=False, response_len=0
  )
  by_group(
    run,
    stage,
    folder,
    log,
    run.config.grpo,
    examples,
    rows,
    start=role_params.SFT[1],
    max_new=run.config.data.response_len,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def by_group(
  run: Run,
  stage: str,
  folder: pathlib.Path,
  log: Log,
  config: ConfigDict,
  examples: Sequence[Example],
  rows: tokenization.Rows,
  *,
  start: str,
  max_new: int,
) -> TrainState:
  """GRPO on groups of responses that config.oracle scores.

  Args:
    rows: the prompts of the examples.
    start: the stage whose policy it starts from.
    max_new: longest response, in tokens.
  """
  params, frozen = role_params.policy_roles(run, start)
  if config.oracle.kind == "reward":
    frozen["reward"] = role_params.reward_variables(run)
  oracle = oracles.make(run, config.oracle, examples, folder)
  parts = Parts(policy=run.policy, score=oracle.score)
  method = grpo_method.make(config, parts, **sampling(run, max_new))

  def data(step):
    order = common.order_of(run, len(examples), config.batch_size, step)
    return common.rows_of(run, examples, rows, order), order

  graded = _Graded(method.collect, oracle)
  key = common.key_of(run, stage)
  hooks = _group_hooks(run, config, examples, graded, data, key, log)
  if config.kl_anchor == "epoch_start":
    every = max(len(examples) // config.batch_size, 1)
    hooks = hooks._replace(before=_anchor(frozen["policy"], params, folder, every))
  return common.fit(
    run,
    stage,
    folder,
    log,
    config,
    method._replace(collect=Collect(graded.begin, graded.finish)),
    steps=config.steps,
    params=params,
    frozen=frozen,
    data=data,
    hooks=hooks,
    epochs=config.epochs,
    minibatches=config.minibatches,
    one_step_off=config.one_step_off,
  )


def _group_hooks(run, config, examples, graded, data, key, log) -> loop.Hooks:
  """Samples, how right they are, and what the oracle tells of a step.

  Args:
    data, key: of the stage.
    The others: see by_group.
  """
  oracle = graded.oracle
  show = lambda sampled: rollout_samples.rows(run, sampled, oracle.terms, graded.said)
  anew = lambda sampled: rollout_samples.rows(run, sampled, oracle.terms, oracle.said())
  collect = Collect(graded.begin, graded.score)
  again = rollout_samples.Again(run, config, examples, collect, data, key, anew)

  def on_step(step, asked, info):
    told = _told(run, config, examples, step, info, log, show, again)
    return loop.Told({}, {**told, **graded.told})

  hooks = loop.Hooks(on_step=on_step)
  # What is asked of a server may have its price.
  return hooks if config.oracle.judge == "endpoint" else hooks._replace(look=again)


class _Graded:
  """A method's collect, whose oracle is told which examples a batch asks about.

  It keeps what the oracle says of a step's rollout; `score` keeps nothing.
  """

  def __init__(self, collect: Collect, oracle: oracles.Oracle):
    self._collect, self.oracle = collect, oracle
    self.told: dict[str, float] = {}
    self.said: oracles.Said = oracles.SILENT

  def begin(self, key, params, frozen, asked):
    batch, numbers = asked
    return self._collect.begin(key, params, frozen, batch), numbers

  def score(self, params, frozen, begun, phase):
    sampled, numbers = begun
    asked = Frozen({**frozen, "asked": numbers})
    return self._collect.finish(params, asked, sampled, phase)

  def finish(self, params, frozen, begun, phase):
    made = self.score(params, frozen, begun, phase)
    self.told, self.said = self.oracle.told(), self.oracle.said()
    return made


def _anchor(base: Params, like: Params, folder: pathlib.Path, every: int):
  """A hook that makes the policy its own reference, anew every so many steps.

  Each is kept on disk, and read from there, by a run that was killed as by one that
  was not: whichever step it goes on from, it finds the reference of that step.
  """
  laid = set()

  def before(step, params):
    start = step - step % every
    if start in laid:
      return {}
    at = str(folder / "anchor" / str(start))
    if step == start and checkpoint.latest_step(at) is None:
      state = TrainState(np.array(step, np.int32), params, ())
      checkpoint.save(at, state, step, extra={}, keep=1)
    laid.add(start)
    return {"ref": join(base, checkpoint.restore_params(at, like)["policy"])}

  return before


def sampling(run, max_new: int) -> dict[str, int]:
  """What a method that samples is told of lengths and ids."""
  tok = run.tokenizer
  return dict(
    max_new=max_new,
    eos=run.eos,
    pad=tok.pad_token_id,
    vocab=answering.plain_vocab(tok, run.eos),
  )


def make_ppo(run: Run, config: ConfigDict) -> Method:
  """PPO against the reward model and the rules."""
  score = oracles.reward(run, config.stop_penalty, config.length_coef)
  parts = Parts(policy=run.policy, critic=run.scorer, score=score)
  return ppo_method.make(config, parts, **sampling(run, run.config.data.response_len))


def _ppo_hooks(
  run: Run,
  config: ConfigDict,
  examples: Sequence[Example],
  log: Log,
  show: Callable[[rollout_samples.Sampled], list[rollout_samples.Row]],
  again: rollout_samples.Again,
) -> loop.Hooks:
  """Samples, how right they are, and a KL coefficient that adapts if it is to."""
  now = {"kl_coef": config.kl_coef}
  laid = lambda: {"kl_coef": jnp.float32(now["kl_coef"])}

  def on_step(step, batch, info):
    told = _told(run, config, examples, step, info, log, show, again)
    if config.kl_target:
      adapted = adapt_kl_coef(
        jnp.float32(now["kl_coef"]),
        info["kl"],
        target=config.kl_target,
        horizon=config.kl_horizon,
        rows=len(info["scores"]),
      )
      now["kl_coef"] = float(adapted)
    return loop.Told(laid(), {**told, **now})

  def restored(extra):
    now.update(extra)
    return laid()

  return loop.Hooks(
    look=again, on_step=on_step, extra=lambda: dict(now), restored=restored
  )


def _told(run, config, examples, step, info, log, show, again) -> dict[str, float]:
  """Writes samples, and says how right they are, if that is known."""
  sampled = rollout_samples.read(run, config, examples, step, info)
  if rollout_samples.is_due(config, step):
    log.samples(step + 1, show(sampled) + again.rows(step))
  return rollout_samples.right(sampled)
