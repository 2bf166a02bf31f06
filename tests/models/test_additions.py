"""Additions to the outputs of a decoder's first layers (DeepStack)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.rows import text_positions
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.models.decoder import Decoder, DecoderBlock

SHAPE = dict(mlp=16, heads=4, kv_heads=2, rank=2)
LAYERS, TAPS, TIME, WITH = 5, 3, 6, 4  # WITH: tokens that have additions.
MODEL = Decoder(vocab=16, embed=8, layers=LAYERS, **SHAPE)
MASK = jnp.array([[False, False, True, True, True, True], [True] * 6])
X = jax.random.normal(jax.random.key(0), (2, TIME, 8))
INPUTS = (X, text_positions(MASK), MASK)
ADDITIONS = jax.random.normal(jax.random.key(1), (TAPS, 2, WITH, 8))


@pytest.fixture(scope="module")
def variables():
  variables = jax.jit(MODEL.init)(jax.random.key(1), *INPUTS)
  noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape)
  return jax.jit(lambda tree: jax.tree.map(noise, tree))(variables)


def loop(variables, additions):
  """One layer after the other, each with what is added to its output."""
  x, positions, mask = INPUTS
  for i in range(LAYERS):
    own = {
      name: jax.tree.map(lambda a, i=i: a[i], tree["blocks"])
      for name, tree in variables.items()
    }
    x, _ = DecoderBlock(**SHAPE).apply(own, x, positions, mask)
    if i < TAPS:
      x = x.at[:, :WITH].add(additions[i])
  return MODEL.apply(variables, x, method=lambda model, x: model.norm(x))


def results(forward, variables, additions):
  """Hidden states of real tokens, and gradients of weights, LoRA and additions."""

  def loss(variables, additions):
    out = forward(variables, additions)[MASK]
    return jnp.sum(jnp.square(out)), out

  return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, additions)


def scanned(remat="none"):
  model = MODEL.clone(remat=remat)
  return lambda variables, additions: model.apply(variables, *INPUTS, additions)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_layers_equal_a_loop(variables, remat):
  want = results(loop, variables, ADDITIONS)
  weights, additions = want[0]
  assert {"params", "lora"} == set(weights)
  assert np.abs(additions).max(axis=(1, 2, 3)).min() > 0.1  # Each addition has one.
  close(results(scanned(remat), variables, ADDITIONS), want)


def test_tokens_over_the_context_axis_change_nothing(variables):
  want = results(loop, variables, ADDITIONS)
  with jax.set_mesh(sharding.make_mesh(fsdp=1, context=4)):
    got = results(scanned(), variables, ADDITIONS)
  close(jax.device_get(got), jax.device_get(want))


def test_prefill_adds_the_same(variables):
  prefill = functools.partial(MODEL.apply, method="prefill")
  got, caches = jax.jit(prefill, static_argnums=4)(variables, *INPUTS, 8, ADDITIONS)
  np.testing.assert_allclose(got[MASK], loop(variables, ADDITIONS)[MASK], atol=1e-5)
  assert len(caches) == LAYERS
  _, plain = jax.jit(prefill, static_argnums=4)(variables, *INPUTS, 8)
  np.testing.assert_allclose(caches[0].k, plain[0].k, atol=1e-6)
  assert np.abs(caches[1].k - plain[1].k).max() > 0.1  # Layer 1 reads what 0 got.


def test_one_layer_is_compiled_and_no_zeros_for_the_others():
  lower = jax.jit(scanned("full")).lower
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *INPUTS)
  text = lower(shapes, ADDITIONS).as_text()
  assert text.count("stablehlo.while") == 1
  assert f"tensor<{TAPS}x2x{TIME}x8xf32>" in text
  assert f"tensor<{LAYERS}x2x{TIME}x8xf32>" not in text
