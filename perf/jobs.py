"""Builds the jobs that perf/bench.py times: training steps, sampling and loading."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perf.model import (
  Bench,
  count_decode_bytes,
  count_forward_flops,
  count_training_flops,
  get_shapes,
  make_batch,
  make_model,
  make_pass,
)
from perf.random_arrays import make_random_arrays
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

_NEVER = -1  # An EOS id that is never sampled, so that all responses have full length.


class Part(NamedTuple):
  """A function that can be timed repeatedly; it waits for the device."""

  run: Callable[[], Any]
  flops: int  # Counted by planner/flops.py.


class Job(NamedTuple):
  """A job to time, and the parts of it to time separately."""

  all: Part
  tokens: int  # Tokens that a run trains on or samples.
  parts: Mapping[str, Part]
  step_bytes: int = 0  # Bytes that a decoding step reads; 0 without decoding.


class _Learner:
  """A training state and its jitted update."""

  def __init__(self, params: Params, loss: Callable[..., Loss]):
    optimizer = update.default_config()
    optimizer.learning_rate = 3e-5
    tx = update.make_optimizer(optimizer, steps=1000)
    # A copy, because updates donate it and the reference may share its arrays.
    self.state = update.init_state(jax.tree.map(jnp.copy, params), tx)
    self._step = jax.jit(update.make_update(loss, tx), donate_argnums=0)

  def step(self, frozen: Params, experience: Any) -> None:
    self.state, _ = jax.block_until_ready(self._step(self.state, frozen, experience))


def _init_trainable(*models: vlm.VLM) -> tuple[Params, ...]:
  """Returns the initial trainable parameters of each model."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return tuple(
    arrays.initialize_params(arrays.get_trainable_shapes(m, mesh), jax.random.key(0))
    for m in models
  )


def make_sft_job(bench: Bench, *, video: bool) -> Job:
  """Builds a step of SFT."""
  model, size = make_model(bench), bench.size
  (lora,) = _init_trainable(model)
  learner = _Learner(
    {"policy": lora}, sft.make(sft.default_config(), MethodModels(policy=model)).loss
  )
  batch = make_batch(size, size.rows, new=size.new, video=video)
  frozen = {"policy": make_random_arrays(get_shapes(model, bench.base))}
  flops = count_training_flops(make_pass(model, size, size.rows))
  step = functools.partial(learner.step, frozen, batch)
  return Job(Part(step, flops), batch.tokens.size, {})


def make_dpo_job(bench: Bench, *, video: bool) -> Job:
  """Builds a step of DPO on pairs with cached reference log-probabilities."""
  model, size = make_model(bench), bench.size
  (lora,) = _init_trainable(model)
  learner = _Learner(
    {"policy": lora}, dpo.make(dpo.default_config(), MethodModels(policy=model)).loss
  )
  chosen = make_batch(size, size.rows, new=size.new, video=video)
  # The rejected response to the same prompt.
  other = jnp.where(chosen.loss_mask, chosen.tokens[::-1], chosen.tokens)
  sides = chosen, chosen._replace(tokens=other)
  rows = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *sides)
  pairs = group_rows(rows, group=2, start=chosen.tokens.shape[1] - size.new)
  compared = ComparedPairs(pairs, jnp.full((size.rows, 2), -500.0))
  frozen = {"policy": make_random_arrays(get_shapes(model, bench.base))}
  work = make_pass(model, size, size.rows, 2)
  step = functools.partial(learner.step, frozen, compared)
  flops = count_training_flops(work)
  return Job(Part(step, flops), 2 * chosen.tokens.size, {})


def make_grpo_job(bench: Bench, *, video: bool) -> Job:
  """Builds a step of GRPO_rank: sampling, scoring by a rule, and one update."""
  model, size = make_model(bench), bench.size
  (lora,) = _init_trainable(model)
  base = make_random_arrays(get_shapes(model, bench.base))
  config = grpo.default_config()
  config.update(samples=size.group, advantage="oracle_ndcg", kl_coef=0.04)
  config.truncated_responses = "keep"  # No response has an EOS.
  method = grpo.make(
    config,
    MethodModels(policy=model, score=_score_by_rule),
    **_get_length_kwargs(bench),
  )
  work = make_pass(model, size, size.prompts, size.group)
  return _make_rollout_job(
    bench,
    method,
    {"policy": lora},
    {"policy": base, "ref": merge_params(base, lora)},
    # Sampling and the reference's log-probabilities; each reads a prompt once.
    collected=2 * count_forward_flops(work),
    learned=count_training_flops(work),
    video=video,
  )


def make_ppo_job(bench: Bench, *, video: bool) -> Job:
  """Builds a step of PPO: sampling, rewards, values, and an update of both models."""
  model, size = make_model(bench), bench.size
  scorer = model.clone(scalar_head=True)
  lora, critic = _init_trainable(model, scorer)
  base = make_random_arrays(get_shapes(model, bench.base))
  config = ppo.default_config()
  config.update(samples=size.group, kl_coef=0.1)
  score = jax.jit(rewards.make_model_score(scorer, suffix=(1,)))
  parts = MethodModels(policy=model, critic=scorer, score=score)
  method = ppo.make(config, parts, **_get_length_kwargs(bench))
  work = make_pass(model, size, size.prompts, size.group)
  valued = work._replace(model=scorer, logits=False)
  return _make_rollout_job(
    bench,
    method,
    {"policy": lora, "critic": critic},
    {
      "policy": base,
      "ref": merge_params(base, lora),
      "critic": base,
      "reward": merge_params(base, critic),
    },
    collected=2 * count_forward_flops(work) + 2 * count_forward_flops(valued),
    learned=count_training_flops(work) + count_training_flops(valued),
    video=video,
  )


def _make_rollout_job(
  bench, method, params, frozen, *, collected, learned, video
) -> Job:
  size, learner = bench.size, _Learner(params, method.loss)
  prompts = make_batch(size, size.prompts, new=0, video=video)
  rollouts = {}

  def run():
    key = jax.random.key(0)
    rollouts["last"], _ = method.collect(key, learner.state.params, frozen, prompts)
    learner.step(frozen, rollouts["last"])

  learn = lambda: learner.step(frozen, rollouts["last"])
  tokens = size.prompts * size.group * size.new
  return Job(Part(run, collected + learned), tokens, {"update": Part(learn, learned)})


def _score_by_rule(
  frozen: Params, batch: Batch
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
  """Returns scores that differ within a group and take no time."""
  scores = jnp.sum(batch.tokens, axis=1) % 97
  return scores.astype(jnp.float32), jnp.ones(len(scores), bool)


def _get_length_kwargs(bench: Bench) -> dict[str, Any]:
  return dict(
    max_new=bench.size.new, stops=(_NEVER,), pad=0, vocab=bench.size.llm["vocab"]
  )


def make_sampling_job(bench: Bench, *, video: bool) -> Job:
  """Builds sampling of one response to each prompt, by a policy with LoRA."""
  model, size = make_model(bench), bench.size
  (lora,) = _init_trainable(model)
  variables = merge_params(make_random_arrays(get_shapes(model, bench.base)), lora)
  prompts = make_batch(size, size.rows, new=0, video=video)

  def make_run(new: int):
    settings = dict(max_new=new, temperature=1.0, stops=(_NEVER,), pad=0)
    answer = jax.jit(lambda *args: generate(model, *args, **settings).batch)
    return lambda: jax.block_until_ready(answer(variables, prompts, jax.random.key(0)))

  count = lambda new: count_forward_flops(
    make_pass(model, size._replace(new=new), size.rows)
  )
  return Job(
    Part(make_run(size.new), count(size.new)),
    tokens=size.rows * size.new,
    # Prefill, with one token of each response.
    parts={"prefill": Part(make_run(1), count(0))},
    step_bytes=count_decode_bytes(variables, model, size, size.rows),
  )


def make_loading_job(bench: Bench, *, video: bool) -> Job:
  """Builds loading of a checkpoint's files onto the device."""
  folder = ensure_checkpoint(bench)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])

  def run():
    params = convert.load_checkpoint(folder, quant=bench.base, mesh=mesh)[1]
    jax.block_until_ready(params)

  return Job(Part(run, 0), 0, {})


def ensure_checkpoint(bench: Bench) -> Path:
  """Returns a folder of random weights in Hugging Face's layout, and writes it once."""
  folder = bench.scratch / f"llava-{bench.name}"
  if not (folder / "config.json").exists():  # save_checkpoint writes it last.
    model = make_model(bench)
    params = make_random_arrays(get_shapes(model, "none"))["params"]
    config = convert.make_llava_config(model, image_token=model.llm.vocab - 1)
    convert.save_checkpoint(folder, params, config, dtype="bfloat16")
  return folder


JOBS = {
  "sft": make_sft_job,
  "dpo": make_dpo_job,
  "grpo": make_grpo_job,
  "ppo": make_ppo_job,
  "sample": make_sampling_job,
  "load": make_loading_job,
}
