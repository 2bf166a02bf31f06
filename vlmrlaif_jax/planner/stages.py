"""What each stage compiles, in the order it runs it, with the passes it is made of."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vlmrlaif_jax.core.stage_names import split_round
from vlmrlaif_jax.core.types import ComparedPairs, Frozen, Packed, Parts
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.feedback import generative_rm
from vlmrlaif_jax.methods import dpo, grpo, rm, sft
from vlmrlaif_jax.planner import abstract_run
from vlmrlaif_jax.planner import functions as functions_lib
from vlmrlaif_jax.planner.roofline import Pass
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import oracles, rl
from vlmrlaif_jax.training import loop


class Stage(NamedTuple):
  """A stage of a recipe."""

  name: str
  steps: int  # 0 where that depends on the data.
  rows: int  # Examples, prompts or pairs of a step.
  # That a step learns from or samples; of each response, with its prompt's.
  tokens: int
  functions: list[functions_lib.Function]
  note: str = ""  # What was assumed of the data.


def of_recipe(run: Run, names: list[str]) -> Iterator[Stage]:
  """The stages of these names, as far as they compile anything for the devices."""
  for name in names:
    make = STAGES.get(split_round(name)[0])
    if make is not None:
      yield make(run, name)


def resident(run: Run, stage: Stage, function: functions_lib.Function) -> PyTree:
  """What is on the devices while a function runs, whether it reads it or not: what the
  run was made with and, once its videos are encoded, all of the stage."""
  loaded = run.base, run.scorer_base
  if function.name == "encode":
    return loaded
  return loaded, [(each.roles, each.state) for each in stage.functions]


# Stages that learn from data as it is.


def _sft(run, name) -> Stage:
  config = run.config.sft
  steps = config.short_steps if name == role_params.SFT[0] else config.long_steps
  return _imitation(
    run, name, config, run.config.data, steps, abstract_run.sft_roles(run)
  )


def _grm_sft(run, name) -> Stage:
  config = run.config.grm_sft
  lengths = ConfigDict(dict(prompt_len=config.prompt_len, response_len=config.max_new))
  params, frozen = abstract_run.policy_roles(run)
  made = abstract_run.Roles(params, {"policy": frozen["policy"]})
  return _imitation(run, name, config, lengths, config.steps, made)


def _imitation(run, name, config, lengths, steps, made) -> Stage:
  time, rows = lengths.prompt_len + lengths.response_len, config.batch_size
  method = sft.make(config, Parts(policy=run.policy))
  plan = loop.Plan(steps, config.save_every)
  learns = functions_lib.one_pass(
    run, "train", "policy", run.policy, rows, time, config
  )
  data: Any = abstract_run.batch(run, rows, time)
  if config.pack_len:
    learns, data = _packed(run, config, learns, rows, time)
  update = functions_lib.update(run, config, method, plan, made, lambda: data, [learns])
  each, note = [functions_lib.encode(run, rows), update], _note(config)
  return Stage(name, steps, rows, rows * time, each, note)


def _note(config) -> str:
  if not config.pack_len:
    return ""
  return (
    f"  {config.batch_size} examples are packed in rows of {config.pack_len} tokens: "
    "as many rows as would be full if each were at its longest; a run's data has less"
  )


def _packed(run, config, of: Pass, examples, time, each=1) -> tuple[Pass, Packed]:
  """A pass over examples in rows of their own, and its data, packed."""
  rows, videos, data = functions_lib.packed(run, config, examples, time, each)
  frames = of.frames * videos
  of = of._replace(rows=rows, time=config.pack_len, frames=frames, start=0, group=1)
  return of, data


def _rm(run, name) -> Stage:
  config, data = run.config.rm, run.config.data
  suffix = tokenization.suffix_ids(run.tokenizer, run.prompts.reward)
  time = data.prompt_len + data.response_len + len(suffix)
  rows = config.batch_size
  method = rm.make(config, Parts(reward_model=run.scorer))
  start = data.prompt_len
  learns = functions_lib.one_pass(
    run, "train", "reward", run.scorer, rows, time, config, start=start, group=2
  )
  plan, made = loop.Plan(config.steps, config.save_every), abstract_run.rm_roles(run)
  pairs: Any = abstract_run.pairs(run, rows, start, time - start)
  if config.pack_len:
    learns, pairs = _packed(run, config, learns, rows, time, each=2)
  update = functions_lib.update(
    run, config, method, plan, made, lambda: pairs, [learns]
  )
  score = functions_lib.score(run, 64, data.prompt_len + data.response_len, 0.0)
  each, note = [functions_lib.encode(run, rows), update, score], _note(config)
  return Stage(name, config.steps, rows, 2 * rows * time, each, note)


def _dpo(run, name) -> Stage:
  config, data = run.config.dpo, run.config.data
  rows, time = config.batch_size, data.prompt_len + data.response_len
  method = dpo.make(config, Parts(policy=run.policy))
  start, logps_of = data.prompt_len, dpo.pair_logps
  learns = functions_lib.one_pass(
    run, "train", "policy", run.policy, rows, time, config, start=start, group=2
  )
  pairs: Any = abstract_run.pairs(run, rows, start, data.response_len)
  ref = jax.ShapeDtypeStruct((rows, 2), jnp.float32)
  if config.pack_len:
    learns, pairs = _packed(run, config, learns, rows, time, each=2)
    logps_of, places = dpo.packed_pair_logps, pairs.video.shape[:2]
    ref = jax.ShapeDtypeStruct((*places, 2), jnp.float32)
  compared = lambda: ComparedPairs(pairs, abstract_run.rowwise(ref, run.mesh))
  params, frozen = abstract_run.policy_roles(run)
  made = abstract_run.Roles(params, {"policy": frozen["policy"]})
  plan = loop.Plan(config.steps, config.save_every)
  update = functions_lib.update(run, config, method, plan, made, compared, [learns])
  # Once for each pair, where a step goes over them again and again.
  refer = functions_lib.Function(
    "reference",
    jax.jit(functools.partial(logps_of, config, run.policy)),
    lambda: (frozen["ref"], pairs),
    {"": [learns._replace(phase="forward", role="ref", parts=1)]},
    runs=1.0,
    roles={"ref": frozen["ref"]},
  )
  each, note = [functions_lib.encode(run, rows), refer, update], _note(config)
  return Stage(name, config.steps, rows, 2 * rows * time, each, note)


# Stages that sample what they learn from.


def _ppo(run, name) -> Stage:
  config, data = run.config.ppo, run.config.data
  rows = config.batch_size * config.samples
  time = data.prompt_len + data.response_len
  method, made = rl.make_ppo(run, config), abstract_run.ppo_roles(run)
  given = dict(rows=rows, time=time, config=config, start=data.prompt_len)
  forward = functools.partial(functions_lib.one_pass, run, "forward", **given)
  passes = {
    **_sampled(run, config, data),
    "score": [functions_lib.scoring(run, rows, time)],
    "weigh": [
      forward("policy", run.policy),
      forward("ref", run.policy),
      forward("critic", run.scorer),
    ],
  }
  given["rows"] = rows // config.minibatches
  learns = [
    functions_lib.one_pass(run, "train", "policy", run.policy, **given),
    functions_lib.one_pass(run, "train", "critic", run.scorer, **given),
  ]
  return _online(run, name, config, data, method, made, passes, learns)


def _sampled(run, config, lengths) -> dict[str, list[Pass]]:
  given = run, "policy", config.batch_size, lengths, config.samples
  return {"sample": functions_lib.sampling(*given, slots=config.slots)}


def _grpo(run, name) -> Stage:
  return _by_group(run, name, run.config.grpo, run.config.data)


def _grm(run, name) -> Stage:
  config = run.config.grm
  lengths = ConfigDict(dict(prompt_len=config.prompt_len, response_len=config.max_new))
  return _by_group(run, name, config, lengths)


def _by_group(run, name, config, lengths) -> Stage:
  rows = config.batch_size * config.samples
  time = lengths.prompt_len + lengths.response_len
  made, kind = abstract_run.policy_roles(run), config.oracle.kind
  score = _of_the_host
  if kind == "reward":
    made.frozen["reward"] = abstract_run.reward_variables(run)
    oracle = config.oracle
    score = jax.jit(oracles.reward(run, oracle.stop_penalty, oracle.length_coef))
  given = rl.sampling(run, lengths.response_len)
  method = grpo.make(config, Parts(policy=run.policy, score=score), **given)
  group = functools.partial(
    functions_lib.one_pass,
    run,
    model=run.policy,
    time=time,
    config=config,
    start=lengths.prompt_len,
    group=config.samples,
  )
  weigh = [group("forward", "ref", rows=config.batch_size)]
  if config.old_logps == "computed":
    weigh.insert(0, weigh[0]._replace(role="policy"))
  passes = {**_sampled(run, config, lengths), "weigh": weigh}
  if kind == "reward":
    passes["score"] = [functions_lib.scoring(run, rows, time)]
  learns = [group("train", "policy", rows=config.batch_size // config.minibatches)]
  stage = _online(run, name, config, lengths, method, made, passes, learns)
  games = generative_rm.calls(
    config.samples,
    both_orders=config.oracle.both_orders,
    opponents=config.oracle.opponents,
  )
  judged = {
    "scorer": lambda: [functions_lib.score(run, 64, time, rows / 64)],
    "list": lambda: [functions_lib.judge(run, config.oracle, config.batch_size)],
    "pairs": lambda: [
      functions_lib.judge(run, config.oracle, rows * (config.samples - 1))
    ],
    "grm": lambda: [functions_lib.judge(run, config.oracle, config.batch_size * games)],
  }
  if kind in judged and not (kind != "scorer" and config.oracle.judge == "endpoint"):
    stage.functions[2:2] = judged[kind]()
  return stage


def _of_the_host(frozen, batch):
  """Stands for an oracle that reads texts: its scores come from outside."""
  rows = len(batch.tokens)
  return jnp.zeros(rows), jnp.ones(rows, bool)


def _online(run, name, config, lengths, method, made, passes, learns) -> Stage:
  """A stage that collects, and learns from what it has collected.

  Args:
    passes: of what is jitted in collect.
    learns: the passes of an update.
  """
  time = lengths.prompt_len + lengths.response_len
  rows = config.batch_size * config.samples
  prompts = abstract_run.batch(run, config.batch_size, lengths.prompt_len)
  given = (abstract_run.key(run.mesh), made.params, Frozen(made.frozen), prompts)
  tokens = rows * lengths.response_len
  collect = functions_lib.Function(
    "collect",
    method.collect,
    lambda: given,
    passes,
    runs=1.0,
    roles={**made.frozen, "trained": made.params},
    responses=tokens,
  )

  def data():
    shapes = jax.eval_shape(lambda *given: method.collect(*given)[0], *given)

    def cut(x):
      rows, *rest = x.shape
      return jax.ShapeDtypeStruct((rows // config.minibatches, *rest), x.dtype)

    return abstract_run.rowwise(jax.tree.map(cut, shapes), run.mesh)

  plan = loop.Plan(
    config.steps,
    config.save_every,
    epochs=config.epochs,
    minibatches=config.minibatches,
  )
  update = functions_lib.update(run, config, method, plan, made, data, learns)
  each = [functions_lib.encode(run, config.batch_size), collect, update]
  return Stage(name, config.steps, config.batch_size, rows * time, each)


# Stages that only ask.


def _label(run, name) -> Stage:
  config, data = run.config.label, run.config.data
  clips = -(-run.config.model.frames // run.config.model.clip_frames)
  sft = abstract_run.policy_roles(run).frozen["ref"]
  ask = functools.partial(functions_lib.answers, run, sft, prompts=config.batch)
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
  each = [functions_lib.encode(run, config.batch), answers, captions, judge]
  return Stage(name, 0, config.batch, tokens, each)


def _evaluate(run, name) -> Stage:
  config, data = run.config.evaluate, run.config.data
  policy = abstract_run.policy_roles(run).frozen["ref"]
  lengths = data.prompt_len, data.response_len
  made = functions_lib.answers(
    run, policy, "answers", *lengths, prompts=config.batch, runs=1.0
  )
  tokens = config.batch * (data.prompt_len + data.response_len)
  return Stage(
    name, 0, config.batch, tokens, [functions_lib.encode(run, config.batch), made]
  )


def _claims(run, name) -> Stage:
  config, data = run.config.claims, run.config.data
  policy = abstract_run.policy_roles(run).frozen["ref"]
  ask = functools.partial(functions_lib.answers, run, policy, prompts=config.batch)
  each = [
    functions_lib.encode(run, config.batch),
    ask(
      "answers", data.prompt_len, data.response_len, samples=config.samples, runs=1.0
    ),
  ]
  if config.splitter == "self":
    lengths = config.split_prompt_len, config.split_max_new
    each.append(ask("split", *lengths, runs=float(config.samples)))
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  return Stage(name, 0, config.batch, tokens, each)


STAGES: dict[str, Callable[[Run, str], Stage]] = {
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
