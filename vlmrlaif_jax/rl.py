"""PROGRAM: the stages that train on what the policy samples: PPO, GRPO."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax import (
  answer,
  build,
  checkpoint,
  hosts,
  loop,
  oracles,
  roles,
  train,
)
from vlmrlaif_jax.data import text
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world as truth
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.losses.advantages import adapt_kl_coef
from vlmrlaif_jax.methods import grpo as grpo_method
from vlmrlaif_jax.methods import ppo as ppo_method
from vlmrlaif_jax.types import Collect, Frozen, Method, Params, Parts, TrainState, join


def ppo(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains policy and critic against the reward model."""
  config = run.config.ppo
  examples, rows, problems = train.encoded(
    run, run.splits.prompts, log, answered=False, response_len=0
  )
  params, frozen = roles.ppo_roles(run, config.critic_head)
  train.fit(
    run,
    stage,
    folder,
    log,
    config,
    make_ppo(run, config),
    steps=config.steps,
    params=params,
    frozen=frozen | {"kl_coef": jnp.float32(config.kl_coef)},
    data=lambda step: train.batch_of(run, examples, rows, config.batch_size, step),
    hooks=_ppo_hooks(run, config, examples, log),
    epochs=config.epochs,
    minibatches=config.minibatches,
    one_step_off=config.one_step_off,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def grpo(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the policy against an oracle that compares its responses to each prompt."""
  examples, rows, problems = train.encoded(
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
    start=roles.SFT[1],
    max_new=run.config.data.response_len,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def by_group(
  run: build.Run,
  stage: str,
  folder: pathlib.Path,
  log: Log,
  config: ConfigDict,
  examples: Sequence[Example],
  rows: text.Rows,
  *,
  start: str,
  max_new: int,
) -> TrainState:
  """GRPO on groups of responses that config.oracle scores.

  Args:
    config: the stage's section.
    rows: the prompts of the examples.
    start: the stage whose policy it starts from.
    max_new: longest response, in tokens.
  """
  params, frozen = roles.policy_roles(run, start)
  if config.oracle.kind == "reward":
    frozen["reward"] = roles.reward_variables(run)
  oracle = oracles.make(run, config.oracle, examples, folder)
  parts = Parts(policy=run.policy, score=oracle.score)
  method = grpo_method.make(config, parts, **sampling(run, max_new))

  def data(step):
    order = train.order_of(run, len(examples), config.batch_size, step)
    return train.rows_of(run, examples, rows, order), order

  def on_step(step, asked, info):
    told = _told(run, config, examples, step, info, log)
    return loop.Told({}, {**told, **oracle.told()})

  hooks = loop.Hooks(on_step=on_step)
  if config.kl_anchor == "epoch_start":
    every = max(len(examples) // config.batch_size, 1)
    hooks = hooks._replace(before=_anchor(frozen["policy"], params, folder, every))
  return train.fit(
    run,
    stage,
    folder,
    log,
    config,
    method._replace(collect=_numbered(method.collect)),
    steps=config.steps,
    params=params,
    frozen=frozen,
    data=data,
    hooks=hooks,
    epochs=config.epochs,
    minibatches=config.minibatches,
    one_step_off=config.one_step_off,
  )


def _numbered(collect: Collect) -> Collect:
  """Of (batch, numbers of its examples), which the oracle finds in frozen["asked"]."""

  def begin(key, params, frozen, asked):
    batch, numbers = asked
    return collect.begin(key, params, frozen, batch), numbers

  def finish(params, frozen, begun, phase):
    sampled, numbers = begun
    asked = Frozen({**frozen, "asked": numbers})
    return collect.finish(params, asked, sampled, phase)

  return Collect(begin, finish)


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
    vocab=answer.plain_vocab(tok, run.eos),
  )


def make_ppo(run: build.Run, config: ConfigDict) -> Method:
  """PPO against the reward model and the rules."""
  score = oracles.reward(run, config.stop_penalty, config.length_coef)
  parts = Parts(policy=run.policy, critic=run.scorer, score=score)
  return ppo_method.make(config, parts, **sampling(run, run.config.data.response_len))


def _ppo_hooks(
  run: build.Run, config: ConfigDict, examples: Sequence[Example], log: Log
) -> loop.Hooks:
  """Samples, how right they are, and a KL coefficient that adapts if it is to."""
  now = {"kl_coef": config.kl_coef}
  laid = lambda: {"kl_coef": jnp.float32(now["kl_coef"])}

  def on_step(step, batch, info):
    told = _told(run, config, examples, step, info, log)
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

  return loop.Hooks(on_step=on_step, extra=lambda: dict(now), restored=restored)


def _told(run, config, examples, step, info, log) -> dict[str, float]:
  """Writes samples, and says how right the sampled answers are, if that is known: by
  the truth of the embedded world, or by the reference answers of a user's prompts."""
  keep = ("tokens", "loss_mask", "scores", "valid", "has_stop", "row_advantages")
  rows = hosts.fetch({name: info[name] for name in keep})
  texts = text.responses_text(run.tokenizer, rows["tokens"], rows["loss_mask"])
  order = train.order_of(run, len(examples), config.batch_size, step)
  asked = [examples[i] for i in np.repeat(order, config.samples)]
  wrong = [truth.mistakes(e, t) for e, t in zip(asked, texts, strict=True)]
  if (step + 1) % config.samples_every == 0 or step == 0:
    log.samples(
      step + 1,
      [
        {
          "id": e["id"],
          "video": e["video"],
          "prompt": e["question"],
          "response": t,
          "score": float(s),
          "valid": bool(v),
          "advantage": float(a),
          "has_stop": bool(h),
          "truth": None if w is None else w == 0,
        }
        for e, t, s, v, a, h, w in zip(
          asked,
          texts,
          rows["scores"],
          rows["valid"],
          rows["row_advantages"],
          rows["has_stop"],
          wrong,
          strict=True,
        )
      ],
    )
  known = [w == 0 for w in wrong if w is not None]
  met = [
    truth.verdict(e, t).correct
    for e, t, w in zip(asked, texts, wrong, strict=True)
    if w is None and e.get("answer")
  ]
  shares = {"truth": known, "met_reference": met}
  return {name: float(np.mean(marks)) for name, marks in shares.items() if marks}
