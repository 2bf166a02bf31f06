"""Rollouts by a real vLLM server: the policy's own samples, and faults of a server."""

import concurrent.futures
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.policy import (
  NEW,
  PAD,
  RANK,
  ROWS,
  SAMPLES,
  STOPS,
  TINY,
  load,
  make_sampler,
  prompts,
  sample,
)
from tests.helpers import small, stage_runs, vllm_server
from tests.methods.roles import config_of
from vlmrlaif_jax.core.types import MethodModels
from vlmrlaif_jax.methods import grpo
from vlmrlaif_jax.sampling.generate import compute_response_logps, generate
from vlmrlaif_jax.serving import export
from vlmrlaif_jax.stages.training import grpo as grpo_stage
from vlmrlaif_jax.stages.training import ppo as ppo_stage
from vlmrlaif_jax.training import update as updates

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  folder = tmp_path_factory.mktemp("vllm")
  export.write_decoder(folder / "decoder", TINY, "float32")
  made = vllm_server.Server(folder / "decoder", folder / "log", RANK)
  made.start()
  yield made
  made.kill()


@pytest.fixture
def make(server, tmp_path):
  return lambda **values: make_sampler(tmp_path, server.url, values=values)


def test_greedy_responses_are_those_of_our_sampler(make):
  model, params, frozen = load()
  got = sample(make(temperature=0.0, samples=1))
  variables = {**frozen["policy"], **params["policy"]}
  want = jax.jit(
    functools.partial(
      generate, model, max_new=NEW, temperature=0.0, stops=STOPS, pad=PAD,
      vocab=model.llm.vocab - 4,
    )
  )(variables, prompts(model), jax.random.key(0))  # fmt: skip
  plain = jax.jit(
    functools.partial(
      generate, model, max_new=NEW, temperature=0.0, stops=STOPS, pad=PAD
    )
  )(frozen["policy"], prompts(model), jax.random.key(0))
  assert (np.asarray(plain.batch.tokens) != want.batch.tokens).any()
  np.testing.assert_allclose(got.batch.video, want.batch.video, atol=1e-6)
  for ours, theirs in zip(want.batch[1:], got.batch[1:], strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_log_probabilities_are_the_trainers(make):
  model, params, frozen = load()
  got = sample(make())
  again = sample(make())
  other = sample(make(), seed=1)
  start = prompts(model).tokens.shape[1]
  variables = {**frozen["policy"], **params["policy"]}
  logps, _ = jax.jit(
    functools.partial(
      compute_response_logps, model, start=start, chunk=16, temperature=1.0
    )
  )(variables, got.batch)
  np.testing.assert_allclose(got.logps, logps, atol=2e-4)
  assert got.batch.tokens.shape == (len(ROWS) * SAMPLES, start + NEW)
  np.testing.assert_array_equal(got.batch.tokens, again.batch.tokens)
  assert (np.asarray(got.batch.tokens) != other.batch.tokens).any()
  # The samples of a prompt differ, and those that stop end with the end token.
  rows = np.asarray(got.batch.tokens)[:, start:].reshape(len(ROWS), SAMPLES, NEW)
  assert all(len(np.unique(group, axis=0)) > 1 for group in rows)
  length = np.asarray(got.batch.loss_mask).sum(axis=1)
  last = rows.reshape(-1, NEW)[np.arange(len(length)), length - 1]
  assert all((last == STOPS[0]) | (length == NEW))


def test_a_server_that_dies_is_used_again_when_it_returns(make, server):
  want = sample(make())
  sampler = make()
  model, params, frozen = load()
  server.kill()
  pending = sampler.begin(jax.random.key(0), params, frozen, prompts(model))
  with pytest.raises(concurrent.futures.TimeoutError):
    pending[1].result(timeout=3)
  threading.Thread(target=server.start).start()
  got = sampler.finish(pending)
  np.testing.assert_array_equal(got.batch.tokens, want.batch.tokens)


def even_share(frozen, batch):
  """The share of even ids of a response."""
  even = jnp.sum(batch.tokens % 2 == 0, axis=1, where=batch.loss_mask)
  return even / jnp.sum(batch.loss_mask, axis=1), jnp.ones(len(even), bool)


@pytest.mark.parametrize("engine", ["vllm", "jax"])
def test_grpo_learns_with_either_sampler(engine, make):
  model, params, frozen = load()
  config = config_of(grpo, samples=8, advantage="grpo_scalar", kl_coef=0.0)
  config.update(truncated_responses="keep", old_logps="computed")
  sampler = make(samples=8) if engine == "vllm" else None
  parts = MethodModels(policy=model, score=jax.jit(even_share), sampler=sampler)
  limits = dict(stops=STOPS, pad=PAD, vocab=model.llm.vocab - 4)
  method = grpo.make(config, parts, max_new=NEW, **limits)
  optimizer = updates.default_config()
  optimizer.update(learning_rate=1e-2, warmup_steps=0)
  tx = updates.make_optimizer(optimizer, 6)
  state = updates.init_state(params, tx)
  update = jax.jit(updates.make_update(method.loss, tx, microbatches=1))
  rewards, gaps = [], []
  for step in range(6):
    rollout, info = method.collect(
      jax.random.key(step), state.params, frozen, prompts(model)
    )
    rewards.append(float(info["reward"]))
    gaps.append(float(info["sampler_gap"]))
    state, _ = update(state, frozen, rollout)
  assert rewards[0] < 0.7 and rewards[-1] > 0.9, rewards
  assert max(gaps) < 1e-4, gaps


def test_stages_train_on_the_responses_of_a_server(server, tmp_path):
  world = small.write_world(tmp_path / "world")
  settings = small.settings(TINY, world) | {"model.lora_rank": RANK}
  run = stage_runs.started(settings, tmp_path / "run")
  for stage in ("grpo", "ppo"):
    section = run.config[stage]
    section.update(batch_size=4, steps=3, save_every=3, minibatches=1, tis_max=2.0)
    section.optimizer.warmup_steps = 0
    section.rollout.update(engine="vllm", urls=(server.url,))
  run.config.ppo.rollout.max_staleness = 2
  run.config.grpo.update(samples=3, old_logps="computed")
  run.config.grpo.oracle.kind = "truth"
  grpo_stage.check(run.config)
  ppo_stage.check(run.config)
  for stage in ("grpo", "ppo"):
    stage_runs.run_stage(run, stage)
    lines = small.metrics(run.workdir / stage)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    # Later rollouts of PPO are by older policies.
    own = lines[:1] if stage == "ppo" else lines
    assert all(line["sampler_gap"] < 1e-3 for line in own)
