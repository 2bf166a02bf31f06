"""What each stage compiles, in the order it runs it, with the passes it is made of."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax import build, loop, oracles, plan_run, rl, roles
from vlmrlaif_jax import plan_functions as functions
from vlmrlaif_jax.data import text
from vlmrlaif_jax.methods import dpo, grpo, rm, sft
from vlmrlaif_jax.rounds import split_round
from vlmrlaif_jax.types import (
  ComparedPairs,
  Frozen,
  Parts,
)


class Stage(NamedTuple):
  """A stage of a recipe."""

  name: str
  steps: int  # 0 where that depends on the data.
  rows: int  # Examples, prompts or pairs of a step.
  tokens: int  # That a step learns from or samples, prompts included.
  functions: list[functions.Function]


def of_recipe(run: build.Run, names: list[str]) -> Iterator[Stage]:
  """The stages of these names, as far as they compile anything for the devices."""
  for name in names:
    make = STAGES.get(split_round(name)[0])
    if make is not None:
      yield make(run, name)


# Stages that learn from data as it is.


def _sft(run, name) -> Stage:
  config = run.config.sft
  steps = config.short_steps if name == roles.SFT[0] else config.long_steps
  return _imitation(run, name, config, run.config.data, steps, plan_run.sft_roles(run))


def _grm_sft(run, name) -> Stage:
  config = run.config.grm_sft
  lengths = ConfigDict(dict(prompt_len=config.prompt_len, response_len=config.max_new))
  params, frozen = plan_run.policy_roles(run)
  made = plan_run.Roles(params, {"policy": frozen["policy"]})
  return _imitation(run, name, config, lengths, config.steps, made)


def _imitation(run, name, config, lengths, steps, made) -> Stage:
  time, rows = lengths.prompt_len + lengths.response_len, config.batch_size
  method = sft.make(config, Parts(policy=run.policy))
  plan = loop.Plan(steps, config.save_every)
  data = plan_run.batch(run, rows, time)
  learns = functions.one_pass(run, "train", "policy", run.policy, rows, time, config)
  update = functions.update(run, config, method, plan, made, lambda: data, [learns])
  return Stage(name, steps, rows, rows * time, [functions.encode(run, rows), update])


def _rm(run, name) -> Stage:
  config, data = run.config.rm, run.config.data
  suffix = text.suffix_ids(run.tokenizer, run.prompts.reward)
  time = data.prompt_len + data.response_len + len(suffix)
  rows = config.batch_size
  method = rm.make(config, Parts(reward_model=run.scorer))
  learns = functions.one_pass(
    run, "train", "reward", run.scorer, 2 * rows, time, config
  )
  plan, made = loop.Plan(config.steps, config.save_every), plan_run.rm_roles(run)
  start = data.prompt_len
  pairs = lambda: plan_run.pairs(run, rows, start, time - start)
  update = functions.update(run, config, method, plan, made, pairs, [learns])
  score = functions.score(run, 64, data.prompt_len + data.response_len, 0.0)
  each = [functions.encode(run, rows), update, score]
  return Stage(name, config.steps, rows, 2 * rows * time, each)


def _dpo(run, name) -> Stage:
  config, data = run.config.dpo, run.config.data
  rows, time = config.batch_size, data.prompt_len + data.response_len
  method = dpo.make(config, Parts(policy=run.policy))
  pairs = plan_run.pairs(run, rows, data.prompt_len, data.response_len)
  ref = jax.ShapeDtypeStruct((rows, 2), jnp.float32)
  compared = lambda: ComparedPairs(pairs, plan_run.rowwise(ref, run.mesh))
  learns = functions.one_pass(
    run, "train", "policy", run.policy, 2 * rows, time, config
  )
  params, frozen = plan_run.policy_roles(run)
  made = plan_run.Roles(params, {"policy": frozen["policy"]})
  plan = loop.Plan(config.steps, config.save_every)
  update = functions.update(run, config, method, plan, made, compared, [learns])
  # Once for each pair, where a step goes over them again and again.
  refer = functions.Function(
    "reference",
    jax.jit(functools.partial(dpo.pair_logps, config, run.policy)),
    lambda: (frozen["ref"], pairs),
    {"": [learns._replace(phase="forward", role="ref", parts=1)]},
    runs=1.0,
    roles={"ref": frozen["ref"]},
  )
  each = [functions.encode(run, rows), refer, update]
  return Stage(name, config.steps, rows, 2 * rows * time, each)


# Stages that sample what they learn from.


def _ppo(run, name) -> Stage:
  config, data = run.config.ppo, run.config.data
  rows = config.batch_size * config.samples
  time = data.prompt_len + data.response_len
  method, made = rl.make_ppo(run, config), plan_run.ppo_roles(run)
  forward = functools.partial(
    functions.one_pass, run, "forward", rows=rows, config=config
  )
  sampled = [
    *functions.sampling(run, "policy", config.batch_size, data, config.samples),
    functions.scoring(run, rows, time),
    forward("policy", run.policy, time=time),
    forward("ref", run.policy, time=time),
    forward("critic", run.scorer, time=time),
  ]
  return _online(
    run, name, config, data, method, made, {"collect": sampled}, ("policy", "critic")
  )


def _grpo(run, name) -> Stage:
  return _by_group(run, name, run.config.grpo, run.config.data)


def _grm(run, name) -> Stage:
  config = run.config.grm
  lengths = ConfigDict(dict(prompt_len=config.prompt_len, response_len=config.max_new))
  return _by_group(run, name, config, lengths)


def _by_group(run, name, config, lengths) -> Stage:
  rows = config.batch_size * config.samples
  time = lengths.prompt_len + lengths.response_len
  made, kind = plan_run.policy_roles(run), config.oracle.kind
  score = _of_the_host
  if kind == "reward":
    made.frozen["reward"] = plan_run.reward_variables(run)
    oracle = config.oracle
    score = jax.jit(oracles.reward(run, oracle.stop_penalty, oracle.length_coef))
  given = rl.sampling(run, lengths.response_len)
  method = grpo.make(config, Parts(policy=run.policy, score=score), **given)
  forward = functools.partial(
    functions.one_pass, run, "forward", rows=rows, config=config
  )
  passes = {
    "sample": functions.sampling(
      run, "policy", config.batch_size, lengths, config.samples
    ),
    "score": [functions.scoring(run, rows, time)],
    "weigh": [
      forward("policy", run.policy, time=time),
      forward("ref", run.policy, time=time),
    ],
  }
  stage = _online(run, name, config, lengths, method, made, passes, ("policy",))
  judged = {
    "scorer": lambda: [functions.score(run, 64, time, rows / 64)],
    "list": lambda: [functions.judge(run, config.oracle, config.batch_size)],
    "pairs": lambda: [functions.judge(run, config.oracle, rows * (config.samples - 1))],
    "grm": lambda: [functions.judge(run, config.oracle, rows * (config.samples - 1))],
  }
  if kind in judged and not (kind != "scorer" and config.oracle.judge == "endpoint"):
    stage.functions[2:2] = judged[kind]()
  return stage


def _of_the_host(frozen, batch):
  """Stands for an oracle that reads texts: its scores come from outside."""
  rows = len(batch.tokens)
  return jnp.zeros(rows), jnp.ones(rows, bool)


def _online(run, name, config, lengths, method, made, passes, trained) -> Stage:
  """A stage that collects, and learns from what it has collected.

  Args:
    passes: of what is jitted in collect.
    trained: roles.
  """
  time = lengths.prompt_len + lengths.response_len
  rows = config.batch_size * config.samples
  prompts = plan_run.batch(run, config.batch_size, lengths.prompt_len)
  given = (plan_run.key(run.mesh), made.params, Frozen(made.frozen), prompts)
  tokens = rows * lengths.response_len
  collect = functions.Function(
    "collect",
    method.collect,
    lambda: given,
    passes,
    runs=1.0,
    roles={**made.frozen, "trained": made.params},
    responses=tokens,
  )
  part = rows // config.minibatches

  def data():
    shapes = jax.eval_shape(lambda *given: method.collect(*given)[0], *given)

    def cut(x):
      rows, *rest = x.shape
      return jax.ShapeDtypeStruct((rows // config.minibatches, *rest), x.dtype)

    return plan_run.rowwise(jax.tree.map(cut, shapes), run.mesh)

  models = {"policy": run.policy, "critic": run.scorer}
  learns = [
    functions.one_pass(run, "train", role, models[role], part, time, config)
    for role in trained
  ]
  plan = loop.Plan(
    config.steps,
    config.save_every,
    epochs=config.epochs,
    minibatches=config.minibatches,
  )
  update = functions.update(run, config, method, plan, made, data, learns)
  each = [functions.encode(run, config.batch_size), collect, update]
  return Stage(name, config.steps, config.batch_size, rows * time, each)


# Stages that only ask.


def _label(run, name) -> Stage:
  config, data = run.config.label, run.config.data
  clips = -(-run.config.model.frames // run.config.model.clip_frames)
  ask = functools.partial(functions.answers, run, prompts=config.batch)
  answers = ask(
    "answers", data.prompt_len, data.response_len, samples=config.samples, runs=1.0
  )
  captions = ask(
    "captions",
    config.caption_prompt_len,
    config.caption_max_new,
    runs=float(clips),
    frames=run.config.model.clip_frames,
  )
  judge = ask("judge", config.judge_prompt_len, config.judge_max_new, runs=2.0)
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  each = [functions.encode(run, config.batch), answers, captions, judge]
  return Stage(name, 0, config.batch, tokens, each)


def _evaluate(run, name) -> Stage:
  config, data = run.config.evaluate, run.config.data
  made = functions.answers(
    run, "answers", data.prompt_len, data.response_len, prompts=config.batch, runs=1.0
  )
  tokens = config.batch * (data.prompt_len + data.response_len)
  return Stage(
    name, 0, config.batch, tokens, [functions.encode(run, config.batch), made]
  )


def _claims(run, name) -> Stage:
  config, data = run.config.claims, run.config.data
  ask = functools.partial(functions.answers, run, prompts=config.batch)
  each = [
    functions.encode(run, config.batch),
    ask(
      "answers", data.prompt_len, data.response_len, samples=config.samples, runs=1.0
    ),
  ]
  if config.splitter == "self":
    lengths = config.split_prompt_len, config.split_max_new
    each.append(ask("split", *lengths, runs=float(config.samples)))
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  return Stage(name, 0, config.batch, tokens, each)


STAGES: dict[str, Callable[[build.Run, str], Stage]] = {
  "sft_short": _sft,
  "sft_long": _sft,
  "label": _label,
  "rm": _rm,
  "ppo": _ppo,
  "claims": _claims,
  "dpo": _dpo,
  "grpo": _grpo,
  "grm_sft": _grm_sft,
  "grm": _grm,
  "eval": _evaluate,
}
SECTIONS = {name: name for name in STAGES} | {
  "sft_short": "sft",
  "sft_long": "sft",
  "eval": "evaluate",
}


def section_of(stage: str) -> str:
  """The section of the config that a stage reads."""
  return SECTIONS[split_round(stage)[0]]
