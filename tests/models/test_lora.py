import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmrlaif_jax.models import lora
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.models.ops.attention import causal_mask

X = jax.random.normal(jax.random.key(0), (2, 5, 32))
POSITIONS = jnp.broadcast_to(jnp.arange(5), (2, 5))
INPUTS = (X, POSITIONS[..., None], causal_mask(POSITIONS >= 0))
MODEL = llama.Model(**llama.VARIANTS["tiny"], rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def variables():
  """Of a decoder whose updates have been trained."""
  variables = jax.jit(MODEL.init)(jax.random.key(1), *INPUTS)
  random = lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape)
  return {**variables, "lora": jax.tree.map(random, variables["lora"])}


def test_merge_keeps_the_dtype_of_kernels(variables):
  bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
  merged = lora.merge_lora({"params": bf16, "lora": variables["lora"]}, MODEL.alpha)
  assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_merge_of_a_quantised_base_equals_apply():
  model = llama.Model(**{**llama.VARIANTS["tiny"], "embed": 64}, rank=4, alpha=6.0)
  x = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, *INPUTS[1:])
  random = lambda x: np.random.default_rng(x.size).normal(0, 0.2, x.shape)
  variables = jax.tree.map(lambda x: jnp.float32(random(x)), shapes)
  base = quantization.quantize_params(
    variables["params"], llama.QUANTIZED, scheme="nf4"
  )
  merged = lora.merge_lora({**base, "lora": variables["lora"]}, model.alpha)
  assert set(merged) == {"params"}
  assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
  apply = jax.jit(model.apply)
  want = apply({**base, "lora": variables["lora"]}, x, *INPUTS[1:])
  np.testing.assert_allclose(apply(merged, x, *INPUTS[1:]), want, atol=2e-5)


@pytest.mark.parametrize("kept", [("lora",), ("frozen_lora",), lora.UPDATES])
def test_merged_and_joined_updates_equal_apply(variables, kept):
  wider = llama.Model(**llama.VARIANTS["tiny"], rank=3, alpha=6.0)
  frozen = jax.jit(wider.init)(jax.random.key(2), *INPUTS)["lora"]
  random = lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape)
  both = {"lora": variables["lora"], "frozen_lora": jax.tree.map(random, frozen)}
  given = {"params": variables["params"], **{name: both[name] for name in kept}}
  want = MODEL.apply(given, *INPUTS)
  merged = lora.merge_lora(given, MODEL.alpha)
  assert set(merged) == {"params"}
  np.testing.assert_allclose(MODEL.apply(merged, *INPUTS), want, atol=2e-5)
  joined = lora.join_lora(given, MODEL.alpha)
  rank = sum({"lora": 4, "frozen_lora": 3}[name] for name in kept)
  model = MODEL.clone(rank=rank, alpha=float(rank))
  got = model.apply({"params": variables["params"], "lora": joined}, *INPUTS)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_count_is_the_number_of_numbers():
  assert lora.count_params({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}}) == 10
