"""Groups of a small model's own responses, on one device and on four."""

import chex
import jax
import numpy as np
import optax

from tests.methods import roles
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import MethodModels
from vlmrlaif_jax.methods import grpo
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.training.update import init_state, make_update


def test_groups_of_a_real_model_start_at_a_ratio_of_one():
  small = llama.Model(**{**llama.VARIANTS["tiny"], "layers": 1})
  model = roles.MODEL.clone(llm=small)
  features = jax.random.normal(jax.random.key(1), (roles.ROWS, roles.FRAMES, 16, 32))
  prompts = roles.prompts()._replace(video=features)
  weights = roles.noisy(jax.jit(model.init)(jax.random.key(0), prompts), 1)
  score = lambda frozen, batch: (
    np.asarray(batch.tokens).sum(axis=1).astype(float),
    np.ones(2 * roles.ROWS, bool),
  )
  config = roles.config_of(grpo, samples=2, truncated_responses="keep", temperature=0.7)
  method = grpo.make(
    config,
    MethodModels(policy=model, score=score),
    max_new=roles.NEW,
    stops=(roles.EOS,),
    pad=roles.PAD,
    vocab=roles.VOCAB,
  )
  params, frozen = {"policy": weights}, {"policy": {}, "ref": weights}
  rollout, _ = method.collect(jax.random.key(3), params, frozen, prompts)
  np.testing.assert_array_equal(rollout.groups.prompts.tokens, prompts.tokens)
  tokens = np.asarray(rollout.groups.tokens)
  assert tokens.shape == (roles.ROWS, 2, roles.NEW)
  assert (tokens[:, 0] != tokens[:, 1]).any()
  loss = jax.jit(method.loss)(params, frozen, rollout)
  assert loss.metrics["clip_fraction"] == 0 and loss.metrics["approx_kl"] < 1e-10
  assert loss.weight == np.asarray(rollout.groups.loss_mask).any(axis=2).sum() > 2


def test_a_step_on_four_devices_is_that_of_rows_on_one():
  small = llama.Model(**{**llama.VARIANTS["tiny"], "layers": 1}, rank=4)
  model = roles.MODEL.clone(llm=small)
  features = jax.random.normal(jax.random.key(1), (roles.ROWS, roles.FRAMES, 16, 32))
  prompts = roles.prompts()._replace(video=features)
  variables = roles.noisy(jax.jit(model.init)(jax.random.key(0), prompts), 1)
  config = roles.config_of(grpo, samples=3, truncated_responses="keep")

  def method(shared, remat):
    config.shared_prefix = shared
    policy = model.clone(llm=small.clone(remat=remat))
    parts = MethodModels(policy=policy, score=jax.jit(roles.score_all))
    sizes = dict(
      max_new=roles.NEW, stops=(roles.EOS,), pad=roles.PAD, vocab=roles.VOCAB
    )
    return grpo.make(config, parts, **sizes)

  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  put = lambda tree: jax.device_put(
    tree, sharding.shard_by_rules(tree, vlm.SHARDING, mesh)
  )
  params = {"policy": {"lora": variables["lora"]}}
  frozen = {"policy": {"params": variables["params"]}, "ref": variables}
  moved = jax.tree.map(lambda x: 1.2 * x, params)
  tx = optax.sgd(1.0)
  on_mesh, plain = method(True, "full"), method(False, "none")
  rollout, info = on_mesh.collect(
    jax.random.key(3), put(params), put(frozen), sharding.shard_batch(prompts, mesh)
  )
  assert info["tokens"].shape == (roles.ROWS * 3, roles.NEW) and info["learned"] > 0.5
  step = lambda method: jax.jit(make_update(method.loss, tx, microbatches=3))
  got, said = step(on_mesh)(
    put(init_state(moved, tx)), put(frozen), sharding.shard_batch(rollout, mesh)
  )
  rollout = jax.device_put(jax.device_get(rollout))
  want, said_plain = step(plain)(init_state(moved, tx), frozen, rollout)
  chex.assert_trees_all_close(said, said_plain, atol=1e-6, rtol=1e-4)
  chex.assert_trees_all_close(got.params, want.params, atol=1e-5)
  assert said["grad_norm"] > 1e-3
