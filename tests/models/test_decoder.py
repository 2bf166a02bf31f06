import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.rows import text_positions
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.models.decoder import Decoder
from vlmrlaif_jax.models.ops.attention import causal_mask

SHAPE = dict(vocab=16, embed=8, mlp=16, layers=3, heads=4, kv_heads=2)
MASK = jnp.array([[False, False, True, True, True, True], [True] * 6])
X = jax.random.normal(jax.random.key(0), (2, 6, 8))
INPUTS = (X, text_positions(MASK), causal_mask(MASK))


@pytest.fixture(scope="module")
def variables():
  variables = jax.jit(Decoder(**SHAPE, rank=2).init)(jax.random.key(1), *INPUTS)
  # Larger ones would blow rounding up beyond what the tests tell apart.
  noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape)
  return jax.jit(lambda tree: jax.tree.map(noise, tree))(variables)


def test_several_tokens_can_enter_the_cache_at_once(variables):
  model = Decoder(**SHAPE, rank=2)
  first, rest = ([part[:, at] for part in INPUTS] for at in (slice(2), slice(2, 6)))
  first[2] = first[2][..., :2]
  _, caches = model.apply(variables, *first, 6, method="prefill")
  decode = jax.jit(functools.partial(model.apply, method="decode"))
  got, _ = decode(variables, *rest, caches, 2)
  want = jax.jit(model.apply)(variables, *INPUTS)[:, 2:]
  np.testing.assert_allclose(got[MASK[:, 2:]], want[MASK[:, 2:]], atol=1e-5)


def test_a_token_is_not_changed_by_what_its_mask_hides(variables):
  model, (x, positions, mask) = Decoder(**SHAPE, rank=2), INPUTS
  mask = mask.at[:, 5, 3].set(False).at[:, 4, 3].set(False)
  moved = x.at[:, 3].add(1.0)
  before = model.apply(variables, x, positions, mask)
  after = model.apply(variables, moved, positions, mask)
  np.testing.assert_array_equal(before[:, 5], after[:, 5])
  assert np.abs(before[:, 3] - after[:, 3]).max() > 0.1


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(variables, remat):
  def grad(remat):
    model = Decoder(**SHAPE, rank=2, remat=remat)
    loss = lambda v: jnp.sum(jnp.square(model.apply(v, *INPUTS)))
    return jax.jit(jax.grad(loss))(variables)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    grad(remat),
    grad("none"),
  )


def test_remat_holds_less_for_the_backward_pass(variables):
  def held(remat):
    model = Decoder(**SHAPE, rank=2, remat=remat)
    _, back = jax.vjp(lambda v: model.apply(v, *INPUTS), variables)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(back))

  assert held("full") < held("dots") < held("none")


def test_remat_of_another_name_is_refused(variables):
  with pytest.raises(ValueError, match="remat must be one of .*'full'.*, not 'some'"):
    Decoder(**SHAPE, rank=2, remat="some").apply(variables, *INPUTS)


def test_head_dim_may_differ_from_embed_over_heads():
  shapes = jax.eval_shape(
    Decoder(**SHAPE, head_dim=6, qkv_bias=True).init, jax.random.key(0), *INPUTS
  )["params"]["blocks"]
  assert shapes["q"]["kernel"].shape == (3, 8, 24)
  assert shapes["k"]["bias"].shape == (3, 12)
  assert shapes["o"]["kernel"].shape == (3, 24, 8)


def test_logits_are_float32_when_the_rest_is_bfloat16():
  model = Decoder(**SHAPE, dtype="bfloat16", param_dtype="bfloat16")
  forward = lambda m, x, p, mask: (m(x, p, mask), m.logits(m(x, p, mask)))
  bf16 = INPUTS[0].astype(jnp.bfloat16)
  outputs = lambda key: model.init_with_output(key, bf16, *INPUTS[1:], method=forward)[
    0
  ]
  hidden, logits = jax.eval_shape(outputs, jax.random.key(0))
  assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


def test_logits_are_hidden_times_the_head_kernel(variables):
  model, hidden = Decoder(**SHAPE), jax.random.normal(jax.random.key(3), (2, 8))
  kernel = jax.random.normal(jax.random.key(4), (8, 16))
  variables = {"params": {"lm_head": {"kernel": kernel}}}
  np.testing.assert_array_equal(model.apply(variables, method="head_kernel"), kernel)
  logits = model.apply(variables, hidden, method="logits")
  np.testing.assert_allclose(logits, hidden @ kernel, atol=1e-6)


def over_context(function, *given):
  """Of tokens that are spread over four devices, which do not divide the 6."""
  with jax.set_mesh(sharding.make_mesh(fsdp=1, context=4)):
    return jax.jit(function)(*given)


@pytest.mark.parametrize("mask", [MASK, causal_mask(MASK)], ids=["real", "pairs"])
def test_context_changes_neither_output_nor_gradient(variables, mask):
  def loss(variables):
    out = Decoder(**SHAPE, rank=2).apply(variables, *INPUTS[:2], mask)[MASK]
    return jnp.sum(jnp.square(out)), out

  both = jax.grad(loss, has_aux=True)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, over_context(both, variables), jax.jit(both)(variables))


def test_prefill_over_context_fills_the_same_caches(variables):
  model = Decoder(**SHAPE, rank=2)
  prefill = lambda v: model.apply(v, X, *INPUTS[1:], 9, method="prefill")
  (got, caches), (want, whole) = over_context(prefill, variables), prefill(variables)
  np.testing.assert_allclose(got[MASK], want[MASK], atol=1e-5)
  real = np.pad(MASK, [(0, 0), (0, 3)])[:, None, :, None]
  for mine, theirs in zip(jax.tree.leaves(caches), jax.tree.leaves(whole), strict=True):
    assert mine.shape == (2, 2, 9, 2)
    np.testing.assert_allclose(mine * real, theirs * real, atol=1e-5)


def test_a_pass_over_context_gathers_keys_and_values_alone():
  """Of 8 tokens, 2 on a device: all else, activations and scores, is of those 2."""
  model, x, mask = Decoder(**SHAPE), jnp.ones((2, 8, 8)), jnp.ones((2, 8), bool)
  positions = text_positions(mask)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, positions, mask)
  with jax.set_mesh(sharding.make_mesh(fsdp=1, context=4)):
    run = jax.jit(model.apply).lower(shapes, x, positions, mask).compile()
  text = run.as_text()
  gathered = set(re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text))
  assert "2,8,2,2" in gathered  # Keys and values, of 2 rows and 2 heads.
  assert "f32[2,2,2,2,8]" in text and "f32[2,2,2,8,8]" not in text  # Scores.
  assert "f32[2,2,16]" in text and "f32[2,8,16]" not in text  # Of the MLP.
