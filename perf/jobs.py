"""The functions of ours that perf/bench.py runs: training steps and sampling."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perf.model import (
  Bench,
  batch_of,
  decode_bytes,
  forward_flops,
  model_of,
  pass_of,
  shapes_of,
  training_flops,
)
from perf.random_arrays import random_arrays
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import (
  Batch,
  ComparedPairs,
  Loss,
  MethodModels,
  Params,
  group_rows,
  merge_params,
)
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.methods import dpo, grpo, ppo, sft
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import arrays
from vlmrlaif_jax.sampling.generate import generate
from vlmrlaif_jax.training import update

_NEVER = -1  # An id for the end that no sample has: all answers are equally long.


class Part(NamedTuple):
  """Something that can be run again and again; it returns when the device is done."""

  run: Callable[[], Any]
  flops: int  # That it has to compute; see planner/flops.py.


class Job(NamedTuple):
  """One thing to be timed, and what of it is to be timed by itself."""

  all: Part
  tokens: int  # That a run reads (in training) or samples.
  parts: Mapping[str, Part]
  step_bytes: int = 0  # That a step of decoding reads; 0 for what is none.


class _Learner:
  """What is trained, and the jitted step that trains it."""

  def __init__(self, params: Params, loss: Callable[..., Loss]):
    optimizer = update.default_config()
    optimizer.learning_rate = 3e-5
    tx = update.make_optimizer(optimizer, steps=1000)
    # A copy, for updates donate it, and the reference may be the same arrays.
    self.state = update.init_state(jax.tree.map(jnp.copy, params), tx)
    self._step = jax.jit(update.make_update(loss, tx), donate_argnums=0)

  def step(self, frozen: Params, experience: Any) -> None:
    self.state, _ = jax.block_until_ready(self._step(self.state, frozen, experience))


def _roles(*models: vlm.VLM) -> tuple[Params, ...]:
  """For each model: its LoRA, and its head if it has one, as training starts."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return tuple(
    arrays.initialize_params(arrays.get_trainable_shapes(m, mesh), jax.random.key(0))
    for m in models
  )


def fine_tune(bench: Bench, *, video: bool) -> Job:
  """A step of SFT."""
  model, size = model_of(bench), bench.size
  (lora,) = _roles(model)
  learner = _Learner(
    {"policy": lora}, sft.make(sft.default_config(), MethodModels(policy=model)).loss
  )
  batch = batch_of(size, size.rows, new=size.new, video=video)
  frozen = {"policy": random_arrays(shapes_of(model, bench.base))}
  flops = training_flops(pass_of(model, size, size.rows))
  step = functools.partial(learner.step, frozen, batch)
  return Job(Part(step, flops), batch.tokens.size, {})


def prefer(bench: Bench, *, video: bool) -> Job:
  """A step of DPO on pairs of which the reference's log-probs are known."""
  model, size = model_of(bench), bench.size
  (lora,) = _roles(model)
  learner = _Learner(
    {"policy": lora}, dpo.make(dpo.default_config(), MethodModels(policy=model)).loss
  )
  chosen = batch_of(size, size.rows, new=size.new, video=video)
  # Another answer to the same prompt.
  other = jnp.where(chosen.loss_mask, chosen.tokens[::-1], chosen.tokens)
  sides = chosen, chosen._replace(tokens=other)
  rows = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *sides)
  pairs = group_rows(rows, group=2, start=chosen.tokens.shape[1] - size.new)
  compared = ComparedPairs(pairs, jnp.full((size.rows, 2), -500.0))
  frozen = {"policy": random_arrays(shapes_of(model, bench.base))}
  work = pass_of(model, size, size.rows, 2)
  step = functools.partial(learner.step, frozen, compared)
  flops = training_flops(work)
  return Job(Part(step, flops), 2 * chosen.tokens.size, {})


def by_group(bench: Bench, *, video: bool) -> Job:
  """A step of GRPO_rank: sampling, scoring by a rule of the host, one update."""
  model, size = model_of(bench), bench.size
  (lora,) = _roles(model)
  base = random_arrays(shapes_of(model, bench.base))
  config = grpo.default_config()
  config.update(samples=size.group, advantage="oracle_ndcg", kl_coef=0.04)
  config.truncated_responses = "keep"  # None of them comes to an end.
  method = grpo.make(
    config, MethodModels(policy=model, score=_by_rule), **_lengths(bench)
  )
  work = pass_of(model, size, size.prompts, size.group)
  return _rollout_job(
    bench,
    method,
    {"policy": lora},
    {"policy": base, "ref": merge_params(base, lora)},
    # What was sampled, and then what the reference thinks of it; a prompt is read once.
    collected=2 * forward_flops(work),
    learned=training_flops(work),
    video=video,
  )


def by_reward(bench: Bench, *, video: bool) -> Job:
  """A step of PPO: sampling, scoring by a reward model, values, one update of both."""
  model, size = model_of(bench), bench.size
  scorer = model.clone(scalar_head=True)
  lora, critic = _roles(model, scorer)
  base = random_arrays(shapes_of(model, bench.base))
  config = ppo.default_config()
  config.update(samples=size.group, kl_coef=0.1)
  score = rewards.make_reward_fn(
    scorer,
    suffix=(1,),
    eos=_NEVER,
    penalty=0.0,
    length_coef=0.0,
    max_response_len=size.new,
  )
  parts = MethodModels(policy=model, critic=scorer, score=score)
  method = ppo.make(config, parts, **_lengths(bench))
  work = pass_of(model, size, size.prompts, size.group)
  valued = work._replace(model=scorer, logits=False)
  return _rollout_job(
    bench,
    method,
    {"policy": lora, "critic": critic},
    {
      "policy": base,
      "ref": merge_params(base, lora),
      "critic": base,
      "reward": merge_params(base, critic),
    },
    collected=2 * forward_flops(work) + 2 * forward_flops(valued),
    learned=training_flops(work) + training_flops(valued),
    video=video,
  )


def _rollout_job(bench, method, params, frozen, *, collected, learned, video) -> Job:
  size, learner = bench.size, _Learner(params, method.loss)
  prompts = batch_of(size, size.prompts, new=0, video=video)
  kept = {}  # The last experience.

  def run():
    key = jax.random.key(0)
    kept["last"], _ = method.collect(key, learner.state.params, frozen, prompts)
    learner.step(frozen, kept["last"])

  learn = lambda: learner.step(frozen, kept["last"])
  tokens = size.prompts * size.group * size.new
  return Job(Part(run, collected + learned), tokens, {"update": Part(learn, learned)})


def _by_rule(
  frozen: Params, batch: Batch
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
  """Scores that differ within a group, and cost nothing."""
  scores = jnp.sum(batch.tokens, axis=1) % 97
  return scores.astype(jnp.float32), jnp.ones(len(scores), bool)


def _lengths(bench: Bench) -> dict[str, int]:
  return dict(max_new=bench.size.new, eos=_NEVER, pad=0, vocab=bench.size.llm["vocab"])


def sample(bench: Bench, *, video: bool) -> Job:
  """Answers to prompts, one each, by the policy with its LoRA."""
  model, size = model_of(bench), bench.size
  (lora,) = _roles(model)
  variables = merge_params(random_arrays(shapes_of(model, bench.base)), lora)
  prompts = batch_of(size, size.rows, new=0, video=video)

  def answers(new: int):
    settings = dict(max_new=new, temperature=1.0, eos=_NEVER, pad=0)
    answer = jax.jit(lambda *given: generate(model, *given, **settings).batch)
    return lambda: jax.block_until_ready(answer(variables, prompts, jax.random.key(0)))

  count = lambda new: forward_flops(pass_of(model, size._replace(new=new), size.rows))
  return Job(
    Part(answers(size.new), count(size.new)),
    tokens=size.rows * size.new,
    # Reading the prompts, with one token each.
    parts={"prefill": Part(answers(1), count(0))},
    step_bytes=decode_bytes(variables, model, size, size.rows),
  )


def load(bench: Bench, *, video: bool) -> Job:
  """From a checkpoint's files to weights on the device."""
  folder = checkpoint_of(bench)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])

  def run():
    params = convert.load_llava(folder, quant=bench.base, mesh=mesh)[1]
    jax.block_until_ready(params)

  return Job(Part(run, 0), 0, {})


def checkpoint_of(bench: Bench) -> Path:
  """A folder of random weights in Hugging Face's form, written unless it is there."""
  folder = bench.scratch / f"llava-{bench.name}"
  if not (folder / "config.json").exists():  # It is written last.
    model = model_of(bench)
    params = random_arrays(shapes_of(model, "none"))["params"]
    config = convert.make_llava_config(model, image_token=model.llm.vocab - 1)
    convert.save_llava(folder, params, config, dtype="bfloat16")
  return folder


JOBS = {
  "sft": fine_tune,
  "dpo": prefer,
  "grpo": by_group,
  "ppo": by_reward,
  "sample": sample,
  "load": load,
}
