import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.rows import text_positions
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.sharding import BATCH_SPEC
from vlmrlaif_jax.models.decoder import Decoder
from vlmrlaif_jax.models.ops import attention
from vlmrlaif_jax.models.ops.attention import attend


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def inputs(batch, time, heads=4, kv_heads=2, head_dim=8):
  """Queries, keys, values, and the mask of rows padded on all sides in turn."""
  q = normal(0, batch, time, heads, head_dim)
  k, v = (normal(i, batch, kv_heads, time, head_dim) for i in (1, 2))
  mask = np.ones((batch, time), bool)
  mask[0, : time // 3] = False
  mask[1, : time // 4], mask[1, -time // 4 :] = False, False
  return q, k, v, jnp.asarray(mask)


def interpret(monkeypatch):
  """Pallas kernels run on the CPU, as the XLA program that they describe.

  JAX keeps what it has traced: whatever test traces one, let it be interpreted.
  """
  compiled = pl.pallas_call
  call = lambda *args, **settings: compiled(*args, **settings | {"interpret": True})
  monkeypatch.setattr(pl, "pallas_call", call)


@pytest.fixture
def interpreted(monkeypatch):
  interpret(monkeypatch)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
  """XLA in place of the kernel: what is around it is ours, and is tested."""
  plain = jax.nn.dot_product_attention

  def kernel(q, k, v, *, implementation, **settings):
    assert implementation == "cudnn"
    out = plain(q, k, v, implementation="xla", **settings)
    # The real one promises nothing for what lies beyond the lengths.
    real = jnp.arange(q.shape[1]) < settings["query_seq_lengths"][:, None]
    return jnp.where(real[..., None, None], out, jnp.nan)

  monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)


def results(backend, q, k, v, mask, real=None):
  """What attention says of the real tokens, and the gradients of it."""
  real = (mask > 0 if real is None else real)[..., None, None]
  weights = jnp.where(real, normal(3, *q.shape), 0)

  def loss(q, k, v):
    out = attend(q, k, v, mask, backend=backend)
    return jnp.sum(out * weights), jnp.where(real, out, 0)

  grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return {"out": out, "q": grads[0], "k": grads[1], "v": grads[2]}


def assert_same(got, want):
  for name in want:
    assert np.abs(want[name]).max() > 0.1
    np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


def test_attend_equals_a_loop_over_heads_and_tokens():
  q, k, v = normal(0, 2, 3, 4, 5), normal(1, 2, 2, 6, 5), normal(2, 2, 2, 6, 5)
  mask = np.array(jax.random.bernoulli(jax.random.key(3), 0.6, (2, 3, 6)))
  mask[..., 0] = True
  want = np.zeros((2, 3, 4, 5))
  for row, time, head in np.ndindex(2, 3, 4):
    seen = np.flatnonzero(mask[row, time])
    logits = k[row, head // 2, seen] @ q[row, time, head] / np.sqrt(5)
    weights = np.exp(logits) / np.exp(logits).sum()
    want[row, time, head] = weights @ v[row, head // 2, seen]
  np.testing.assert_allclose(attend(q, k, v, jnp.asarray(mask)), want, atol=1e-6)


def test_attend_is_finite_where_everything_is_masked():
  q, k = normal(0, 1, 2, 2, 4), normal(1, 1, 2, 3, 4)
  assert np.isfinite(attend(q, k, k, jnp.zeros((1, 2, 3), bool))).all()


def test_causal_mask_hides_what_comes_later_and_padding():
  got = attention.causal_mask(jnp.array([[False, True, True], [True, True, False]]))
  want = [
    [[0, 0, 0], [0, 1, 0], [0, 1, 1]],
    [[1, 0, 0], [1, 1, 0], [1, 1, 0]],
  ]
  np.testing.assert_array_equal(got, np.array(want, bool))


def test_a_mask_of_real_tokens_stands_for_their_causal_mask():
  q, k, v, mask = inputs(2, 8)
  want = attend(q, k, v, attention.causal_mask(mask))
  np.testing.assert_array_equal(attend(q, k, v, mask), want)


def in_segments(q, k, v, mask):
  """The same with three segments to a row in place of the mask."""
  at = jnp.arange(mask.shape[1]) // (mask.shape[1] // 3 + 1)
  return q, k, v, jnp.where(mask, 1 + at, 0)


def test_a_segment_is_read_as_if_it_stood_alone():
  q, k, v, _ = inputs(2, 9)
  out = attend(q, k, v, jnp.array([[1] * 4 + [2] * 5, [0] * 2 + [1] * 7]))
  part = q[:1, 4:], k[:1, :, 4:], v[:1, :, 4:]
  alone = attend(*part, jnp.ones((1, 5), bool))
  np.testing.assert_allclose(out[:1, 4:], alone, atol=1e-6)


def test_splash_equals_xla_in_segments(interpreted):
  given = in_segments(*inputs(2, 100))
  assert_same(results("splash", *given), results("xla", *given))


@pytest.mark.parametrize("time", [100, 256])
def test_splash_equals_xla(interpreted, time):
  given = inputs(2, time)
  assert_same(results("splash", *given), results("xla", *given))


@pytest.mark.parametrize(
  "sizes, time",
  [
    (dict(fsdp=2, tensor=2), 100),
    (dict(fsdp=1, context=4), 520),  # Parts of 130 tokens, in blocks of 256.
    (dict(fsdp=1, context=2, tensor=2), 100),
  ],
)
def test_splash_under_a_mesh_equals_xla(interpreted, sizes, time):
  given = inputs(2, time)
  with jax.set_mesh(sharding.make_mesh(**sizes)):
    got = results("splash", *given)
  assert_same(got, results("xla", *given))


def test_splash_gathers_keys_and_values_over_context_and_no_queries(interpreted):
  q, k, v, mask = inputs(2, 256, heads=8)
  loss = lambda q, k, v, mask: jnp.sum(attend(q, k, v, mask, backend="splash"))
  mesh = sharding.make_mesh(fsdp=1, context=4)
  place = lambda x, *time: jax.device_put(x, NamedSharding(mesh, P(None, *time)))
  placed = (
    place(q, "context"),
    *(place(x, None, "context") for x in (k, v)),
    place(mask),
  )
  with jax.set_mesh(mesh):
    text = jax.jit(loss).lower(*placed).compile().as_text()
  assert set(re.findall(r"= \S+\[([\d,]+)\]\S* all-gather", text)) == {"2,2,256,8"}
  assert not re.search("all-to-all|permute|scatter", text)


def test_splash_under_a_mesh_moves_nothing_between_devices(interpreted):
  q, k, v, mask = inputs(4, 100)
  loss = lambda q, k, v, mask: jnp.sum(attend(q, k, v, mask, backend="splash"))
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2)
  place = lambda x, *heads: jax.device_put(
    x, NamedSharding(mesh, P(*BATCH_SPEC, *heads))
  )
  placed = place(q, None, "tensor"), place(k, "tensor"), place(v, "tensor"), place(mask)
  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*placed).compile().as_text()
  assert not re.search(r"all-(gather|to-all)|collective-permute|reduce-scatter", text)


def test_splash_refuses_heads_that_the_mesh_does_not_divide():
  given = inputs(4, 100)
  with jax.set_mesh(sharding.make_mesh(fsdp=1, tensor=4)):
    with pytest.raises(ValueError, match='tensor=4 .* 2 key .*"xla"'):
      attend(*given, backend="splash")


def test_splash_is_finite_in_rows_of_padding_alone(interpreted):
  q, k, v, mask = inputs(2, 100)
  out = attend(q, k, v, mask.at[0].set(False), backend="splash")
  assert np.isfinite(out).all()


@pytest.mark.parametrize(
  "time, block, padded",
  [(1, 128, 128), (128, 128, 128), (512, 512, 512), (600, 384, 768), (2048, 512, 2048)],
)
def test_splash_blocks_are_few_and_not_longer_than_it_takes(time, block, padded):
  assert attention.splash_blocks(time) == (block, padded)


@pytest.mark.parametrize("time", [8, 9])
def test_cudnn_equals_xla(cudnn_by_xla, time):
  given = inputs(3, time)
  assert_same(results("cudnn", *given), results("xla", *given))


def test_cudnn_is_finite_in_rows_of_padding_alone(cudnn_by_xla):
  q, k, v, mask = inputs(2, 8)
  out = attend(q, k, v, mask.at[0].set(False), backend="cudnn")
  assert np.isfinite(out).all()


def test_cudnn_refuses_parts_of_rows():
  with jax.set_mesh(sharding.make_mesh(fsdp=2, context=2)):
    with pytest.raises(ValueError, match='context=2: .*"xla"'):
      attend(*inputs(2, 8), backend="cudnn")


def test_cudnn_refuses_segments():
  with pytest.raises(ValueError, match='packed rows.*attention="chunked"'):
    attend(*in_segments(*inputs(2, 8)), backend="cudnn")


@pytest.mark.parametrize("backend", ["chunked", "cudnn", "splash"])
def test_kernels_refuse_masks_that_they_cannot_keep_to(backend):
  q, k, v, mask = inputs(2, 8)
  with pytest.raises(ValueError, match=r"mask of real tokens.*\(2, 8, 8\)"):
    attend(q, k, v, attention.causal_mask(mask), backend=backend)


START, GROUP, TIME = 7, 3, 4


def shared_inputs():
  """Queries, keys, values, and which tokens are real: of prompts, of responses."""
  q, k, v, _ = inputs(2, START + GROUP * TIME)
  lengths = jnp.array([[4, 1, 3], [2, 4, 0]])  # One response of nothing.
  prompt = jnp.arange(START) >= jnp.array([[0], [3]])
  return q, k, v, prompt, jnp.arange(TIME) < lengths[..., None]


@pytest.mark.parametrize("backend", ["xla", "chunked", "cudnn", "splash"])
def test_responses_see_their_prompt_and_themselves(backend, cudnn_by_xla, interpreted):
  *given, prompt, responses = shared_inputs()
  real = jnp.concatenate([prompt, responses.reshape(2, -1)], axis=1)
  # Whose each token is; the prompt is everybody's.
  whose = jnp.asarray([0] * START + [1 + i // TIME for i in range(GROUP * TIME)])
  sees = (whose[:, None] == whose) | (whose == 0)
  want = results("xla", *given, attention.causal_mask(real) & sees, real)
  shared = attention.SharedPromptMask(prompt, responses)
  assert_same(results(backend, *given, shared, real), want)


def test_an_unknown_backend_is_refused():
  with pytest.raises(
    ValueError, match="'chunked', 'cudnn', 'splash', 'xla'.*not 'flash'"
  ):
    attend(*inputs(2, 8), backend="flash")


def test_a_decoder_reads_by_splash_and_writes_by_xla(interpreted):
  shape = dict(vocab=16, embed=8, mlp=16, layers=2, heads=4, kv_heads=2)
  plain, splash = Decoder(**shape), Decoder(**shape, attention="splash", remat="full")
  mask = jnp.array([[False, False, True, True, True, True], [True] * 6])
  x, positions = normal(0, 2, 6, 8), text_positions(mask)
  variables = jax.jit(plain.init)(jax.random.key(1), x, positions, mask)

  def generate(model):
    read = (x[:, :5], positions[:, :5], mask[:, :5])
    hidden, caches = model.apply(variables, *read, 6, method="prefill")
    new = (x[:, 5:], positions[:, 5:], mask[:, None])
    last, _ = model.apply(variables, *new, caches, 5, method="decode")
    return jnp.concatenate([hidden, last], axis=1)

  want = jax.jit(plain.apply)(variables, x, positions, mask)[mask]
  whole = jax.jit(splash.apply)(variables, x, positions, mask)[mask]
  np.testing.assert_allclose(whole, want, atol=1e-5)
  stepwise = jax.jit(generate, static_argnums=0)(splash)[mask]
  np.testing.assert_allclose(stepwise, want, atol=1e-5)
