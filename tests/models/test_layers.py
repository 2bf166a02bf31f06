import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmrlaif_jax.models.layers import Dense, RMSNorm, rope


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def dense():
  """A layer with a LoRA update that has been trained, its variables and an input."""
  layer, x = Dense(6, bias=True, rank=2, alpha=8.0), normal(0, 3, 4)
  variables = layer.init(jax.random.key(1), x)
  variables["lora"]["b"] = normal(2, 2, 6)
  return layer, variables, x


def test_dense_lora_is_the_identity_at_init():
  layer, x = Dense(6, rank=2), normal(0, 3, 4)
  variables = layer.init(jax.random.key(1), x)
  without = layer.apply({"params": variables["params"]}, x)
  np.testing.assert_array_equal(layer.apply(variables, x), without)


def test_dense_equals_its_formula(dense):
  layer, variables, x = dense
  p, lora = variables["params"], variables["lora"]
  want = x @ (p["kernel"] + 8.0 / 2 * lora["a"] @ lora["b"]) + p["bias"]
  np.testing.assert_allclose(layer.apply(variables, x), want, atol=1e-5)


def test_dense_leaves_the_update_out_without_the_lora_collection(dense):
  layer, variables, x = dense
  p = variables["params"]
  want = x @ p["kernel"] + p["bias"]
  np.testing.assert_allclose(layer.apply({"params": p}, x), want, atol=1e-6)


def test_dense_keeps_lora_in_float32_when_the_kernel_is_not():
  layer = Dense(6, rank=2, dtype="bfloat16", param_dtype="bfloat16")
  variables = layer.init(jax.random.key(0), normal(0, 3, 4))
  assert variables["params"]["kernel"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(variables["lora"])} == {np.dtype("float32")}


def test_rms_norm_equals_numpy():
  x, scale = normal(0, 5, 8), normal(1, 8)
  want = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-2) * scale
  got = RMSNorm(1e-2).apply({"params": {"scale": scale}}, x)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_rope_turns_channel_pairs_like_complex_numbers():
  x, positions = np.asarray(normal(0, 1, 3, 2, 8)), np.array([[0, 1, 7]])
  pairs = x[..., :4] + 1j * x[..., 4:]
  frequency = 100.0 ** (-np.array([0, 2, 4, 6]) / 8)
  turned = pairs * np.exp(1j * positions[..., None, None] * frequency)
  want = np.concatenate([turned.real, turned.imag], -1)
  got = rope(jnp.asarray(x), jnp.asarray(positions), base=100.0)
  np.testing.assert_allclose(got, want, atol=1e-6)
