"""What each stage compiles, in the order it runs it, with the passes it is made of."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax import answer, build, loop, oracles, plan_run, rl, roles
from vlmrlaif_jax.data import text
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.generate import generate
from vlmrlaif_jax.methods import dpo, grpo, rm, sft
from vlmrlaif_jax.plan_cost import Pass
from vlmrlaif_jax.rounds import split_round
from vlmrlaif_jax.types import (
  ComparedPairs,
  Frozen,
  Method,
  Pairs,
  Params,
  Parts,
  TrainState,
)


class Function(NamedTuple):
  """A function that a stage jits, and what it does."""

  name: str
  call: Callable  # Jitted; or a collect, of several that are.
  args: Callable[[], tuple[Any, ...]]  # Shapes with shardings; tracing takes a while.
  passes: dict[str, list[Pass]]  # By the name of what is jitted in it.
  runs: float  # In a step.
  roles: Params  # Weights that it reads, shapes by role.
  state: TrainState | None = None  # The shapes of what it trains.
  responses: int = 0  # Tokens that are sampled, at most.


class Stage(NamedTuple):
  """A stage of a recipe."""

  name: str
  steps: int  # 0 where that depends on the data.
  rows: int  # Examples, prompts or pairs of a step.
  tokens: int  # That a step learns from or samples, prompts included.
  functions: list[Function]


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
  learns = _pass(run, "train", "policy", run.policy, rows, time, config)
  update = _update(run, config, method, plan, made, lambda: data, [learns])
  return Stage(name, steps, rows, rows * time, [_encode(run, rows), update])


def _rm(run, name) -> Stage:
  config, data = run.config.rm, run.config.data
  suffix = text.suffix_ids(run.tokenizer, run.prompts.reward)
  time = data.prompt_len + data.response_len + len(suffix)
  rows = config.batch_size
  method = rm.make(config, Parts(reward_model=run.scorer))
  one = plan_run.batch(run, rows, time)
  learns = _pass(run, "train", "reward", run.scorer, 2 * rows, time, config)
  plan, made = loop.Plan(config.steps, config.save_every), plan_run.rm_roles(run)
  pairs = lambda: Pairs(one, one)
  update = _update(run, config, method, plan, made, pairs, [learns])
  score = _score(run, 64, data.prompt_len + data.response_len, 0.0)
  each = [_encode(run, rows), update, score]
  return Stage(name, config.steps, rows, 2 * rows * time, each)


def _dpo(run, name) -> Stage:
  config, data = run.config.dpo, run.config.data
  rows, time = config.batch_size, data.prompt_len + data.response_len
  method = dpo.make(config, Parts(policy=run.policy))
  one = plan_run.batch(run, rows, time)
  ref = jax.ShapeDtypeStruct((rows, 2), jnp.float32)
  compared = lambda: ComparedPairs(Pairs(one, one), plan_run.rowwise(ref, run.mesh))
  learns = _pass(run, "train", "policy", run.policy, 2 * rows, time, config)
  params, frozen = plan_run.policy_roles(run)
  made = plan_run.Roles(params, {"policy": frozen["policy"]})
  plan = loop.Plan(config.steps, config.save_every)
  update = _update(run, config, method, plan, made, compared, [learns])
  # Once for each pair, where a step goes over them again and again.
  refer = Function(
    "reference",
    jax.jit(functools.partial(dpo.pair_logps, config, run.policy)),
    lambda: (frozen["ref"], Pairs(one, one)),
    {"": [learns._replace(phase="forward", role="ref", parts=1)]},
    runs=1.0,
    roles={"ref": frozen["ref"]},
  )
  each = [_encode(run, rows), refer, update]
  return Stage(name, config.steps, rows, 2 * rows * time, each)


# Stages that sample what they learn from.


def _ppo(run, name) -> Stage:
  config, data = run.config.ppo, run.config.data
  rows = config.batch_size * config.samples
  time = data.prompt_len + data.response_len
  method, made = rl.make_ppo(run, config), plan_run.ppo_roles(run)
  forward = functools.partial(_pass, run, "forward", rows=rows, config=config)
  sampled = [
    *_sampling(run, "policy", config.batch_size, data, config.samples),
    _scoring(run, rows, time),
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
  forward = functools.partial(_pass, run, "forward", rows=rows, config=config)
  passes = {
    "sample": _sampling(run, "policy", config.batch_size, lengths, config.samples),
    "score": [_scoring(run, rows, time)],
    "weigh": [
      forward("policy", run.policy, time=time),
      forward("ref", run.policy, time=time),
    ],
  }
  stage = _online(run, name, config, lengths, method, made, passes, ("policy",))
  judged = {
    "scorer": lambda: [_score(run, 64, time, rows / 64)],
    "list": lambda: [_judge(run, config.oracle, config.batch_size)],
    "pairs": lambda: [_judge(run, config.oracle, rows * (config.samples - 1))],
    "grm": lambda: [_judge(run, config.oracle, rows * (config.samples - 1))],
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
  collect = Function(
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
    cut = lambda x: jax.ShapeDtypeStruct((part, *x.shape[1:]), x.dtype)
    return plan_run.rowwise(jax.tree.map(cut, shapes), run.mesh)

  models = {"policy": run.policy, "critic": run.scorer}
  learns = [
    _pass(run, "train", role, models[role], part, time, config) for role in trained
  ]
  plan = loop.Plan(
    config.steps,
    config.save_every,
    epochs=config.epochs,
    minibatches=config.minibatches,
  )
  update = _update(run, config, method, plan, made, data, learns)
  each = [_encode(run, config.batch_size), collect, update]
  return Stage(name, config.steps, config.batch_size, rows * time, each)


# Stages that only ask.


def _label(run, name) -> Stage:
  config, data = run.config.label, run.config.data
  clips = -(-run.config.model.frames // run.config.model.clip_frames)
  ask = functools.partial(_answers, run, prompts=config.batch)
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
  each = [_encode(run, config.batch), answers, captions, judge]
  return Stage(name, 0, config.batch, tokens, each)


def _evaluate(run, name) -> Stage:
  config, data = run.config.evaluate, run.config.data
  made = _answers(
    run, "answers", data.prompt_len, data.response_len, prompts=config.batch, runs=1.0
  )
  tokens = config.batch * (data.prompt_len + data.response_len)
  return Stage(name, 0, config.batch, tokens, [_encode(run, config.batch), made])


def _claims(run, name) -> Stage:
  config, data = run.config.claims, run.config.data
  ask = functools.partial(_answers, run, prompts=config.batch)
  each = [
    _encode(run, config.batch),
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


# The functions they are made of.


def _pass(run, phase, role, model, rows, time, config) -> Pass:
  """Of a model with logits or, with a scalar head, without."""
  speaks = not model.scalar_head
  chunk = config.chunk if speaks and "chunk" in config else time
  parts = config.microbatches if phase == "train" else 1
  frames = run.config.model.frames
  return Pass(phase, role, model, rows, time, 0, speaks, frames, parts, chunk)


def _sampling(run, role, prompts, lengths, samples) -> list[Pass]:
  """Prompts are read once, whatever is sampled for each."""
  slots = lengths.prompt_len + lengths.response_len
  frames, new = run.config.model.frames, lengths.response_len
  read = Pass("prefill", role, run.policy, prompts, lengths.prompt_len, frames=frames)
  return [read, Pass("decode", role, run.policy, prompts * samples, slots, new)]


def _scoring(run, rows, time) -> Pass:
  """The reward model, over responses with the reward prompt after them."""
  suffix = len(text.suffix_ids(run.tokenizer, run.prompts.reward))
  frames = run.config.model.frames
  time += suffix
  return Pass("forward", "reward", run.scorer, rows, time, 0, False, frames)


def _update(run, config, method: Method, plan, made, data, passes) -> Function:
  tx, make = loop.starting(plan, config.optimizer)
  state = plan_run.placed(jax.eval_shape(make, made.params), run.mesh)
  where = jax.tree.map(lambda x: x.sharding, state)
  return Function(
    "update",
    loop.jitted(method.loss, tx, where, config.microbatches),
    lambda: (state, Frozen(made.frozen), data()),
    {"": passes},
    runs=float(plan.epochs * plan.minibatches),
    roles={role: made.frozen[role] for role in made.params},
    state=state,
  )


def _encode(run, videos: int) -> Function:
  """The vision tower; each video goes through it once, whoever asks of it."""
  rows = text.bucket(32, multiple=build.row_shards(run.mesh))
  side, frames = run.policy.vision.image, run.config.model.frames
  pixels = jax.ShapeDtypeStruct((rows, frames, side, side, 3), jnp.uint8)
  return Function(
    "encode",
    build.encoder(run.policy, run.mesh),
    lambda: (run.base, plan_run.rowwise(pixels, run.mesh)),
    {"": [Pass("encode", "policy", run.policy, rows, 0, frames=frames)]},
    runs=videos / rows,
    roles={"policy": {"params": {"vision": run.base["params"]["vision"]}}},
  )


def _score(run, rows: int, time: int, runs: float) -> Function:
  """The reward model by itself, of texts."""
  rows = text.bucket(rows, multiple=build.row_shards(run.mesh))
  suffix = tuple(text.suffix_ids(run.tokenizer, run.prompts.reward))
  call = lambda variables, batch: rewards.scalar_scores(
    run.scorer, variables, batch, suffix
  )
  variables = plan_run.reward_variables(run)
  return Function(
    "scores",
    jax.jit(call),
    lambda: (variables, plan_run.batch(run, rows, time)),
    {"": [_scoring(run, rows, time)]},
    runs,
    roles={"reward": variables},
  )


def _judge(run, oracle: ConfigDict, asked: int) -> Function:
  """A judge of ours, asked so many times in a step."""
  return _answers(
    run,
    "judge",
    oracle.prompt_len,
    oracle.max_new,
    prompts=oracle.batch,
    runs=asked / oracle.batch,
  )


def _answers(
  run, name, prompt_len, max_new, *, prompts, runs, samples=1, frames=0
) -> Function:
  """A model of ours that answers; see answer.py."""
  tok = run.tokenizer
  call = functools.partial(
    generate,
    run.policy,
    max_new=max_new,
    temperature=1.0,
    eos=run.eos,
    pad=tok.pad_token_id,
    samples=samples,
    vocab=answer.plain_vocab(tok, run.eos),
  )
  variables = plan_run.policy_roles(run).frozen["ref"]
  batch = plan_run.batch(run, prompts, prompt_len, frames)
  lengths = ConfigDict(dict(prompt_len=prompt_len, response_len=max_new))
  passes = _sampling(run, "policy", prompts, lengths, samples)
  if frames:
    passes[0] = passes[0]._replace(frames=frames)
  return Function(
    name,
    jax.jit(call),
    lambda: (variables, batch, plan_run.key(run.mesh)),
    {"": passes},
    runs,
    roles={"policy": variables},
    responses=prompts * samples * max_new,
  )
