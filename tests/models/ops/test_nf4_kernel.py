"""The kernel for TPUs, interpreted: on CPUs it runs as the XLA program it describes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.models.ops import nf4_kernel, quantization

each_scheme = pytest.mark.parametrize("scheme", ["nf4", "nf4_double"])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Small blocks are as good as large ones, and are traced and compiled faster."""
  monkeypatch.setattr(nf4_kernel, "_BLOCK", 128)
  compiled = pl.pallas_call
  call = lambda *args, **settings: compiled(*args, **settings, interpret=True)
  monkeypatch.setattr(pl, "pallas_call", call)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_kernel(x, leaves):
  return quantization.matmul(jnp.asarray(x), leaves, backend="pallas")


def assert_near(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@each_scheme
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_dequantise_bit_by_bit(scheme, dtype):
  leaves = quantization.SCHEMES[scheme](normal(0, 192, 200))
  want = jnp.asarray(quantization.dequantise(leaves)).astype(dtype)
  product = jax.jit(lambda x: by_kernel(x, leaves))
  got, back = jax.vjp(product, jnp.eye(192, dtype=dtype))
  np.testing.assert_array_equal(got, want)
  transposed = back(jnp.eye(192, 200, dtype=dtype))[0]
  np.testing.assert_array_equal(transposed, want.T[:192])


# Blocks each way: one, part of one, whole ones, and parts at the edges.
@pytest.mark.parametrize(
  ("block", "inputs", "outputs"),
  [(512, 512, 640), (128, 64, 96), (128, 256, 128), (128, 192, 200)],
)
def test_product_and_gradient_equal_those_of_xla(monkeypatch, block, inputs, outputs):
  monkeypatch.setattr(nf4_kernel, "_BLOCK", block)
  x, leaves = (
    jnp.asarray(normal(0, 2, 5, inputs)),
    quantization.nf4(normal(1, inputs, outputs)),
  )
  g = jnp.asarray(normal(2, 2, 5, outputs))

  @functools.partial(jax.jit, static_argnums=0)
  def both(multiply):
    y, back = jax.vjp(lambda x: multiply(x, leaves), x)
    return y, back(g)[0]

  got, want = both(by_kernel), both(quantization.matmul)
  assert got[0].shape == (2, 5, outputs)
  assert_near(got[0], want[0])
  assert_near(got[1], want[1])


@pytest.mark.parametrize("rows", [1, 16, 33, 49])  # In blocks of 32: 1, 1, 2 and 2.
def test_any_number_of_rows(monkeypatch, rows):
  monkeypatch.setattr(nf4_kernel, "_ROWS", 32)
  x, leaves = normal(0, rows, 128), quantization.nf4(normal(1, 128, 128))
  assert_near(by_kernel(x, leaves), x @ quantization.dequantise(leaves))


def test_frozen_arrays_get_no_gradient():
  x, leaves = normal(0, 3, 64), quantization.nf4(normal(1, 64, 128))
  scale = leaves["block_scale"].astype(np.float32)
  loss = lambda s: jnp.sum(by_kernel(x, {**leaves, "block_scale": s}))
  assert (jax.grad(loss)(scale) == 0).all()


def test_layers_may_be_scanned_and_recomputed():
  leaves = jax.tree.map(
    jnp.asarray, quantization.nf4(normal(0, 3, 128, 128), double=True)
  )
  x = normal(1, 2, 128)

  def grad(multiply):
    layer = jax.checkpoint(lambda x, leaves: (jnp.tanh(multiply(x, leaves)), None))
    loss = lambda x: jnp.sum(jax.lax.scan(layer, x, leaves)[0])
    return jax.jit(jax.grad(loss))(x)

  assert_near(grad(by_kernel), grad(quantization.matmul))


def test_a_mesh_gathers_codes_and_moves_nothing_else():
  """Weights sharded along inputs, as fsdp does."""
  mesh = sharding.make_mesh(fsdp=4, tensor=1)
  x, leaves = normal(0, 8, 3, 256), quantization.nf4(normal(1, 256, 128))
  loss = lambda x, leaves: jnp.sum(jnp.sin(by_kernel(x, leaves)))
  want = jax.grad(lambda x: jnp.sum(jnp.sin(x @ quantization.dequantise(leaves))))(x)
  placed = jax.device_put((x, leaves), NamedSharding(mesh, P("fsdp")))
  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss)).lower(*placed).compile()
  assert_near(program(*placed), want)
  gathered = re.findall(r"= \(?(\w+)\[([\d,]+)\]\S* all-gather", program.as_text())
  assert ("u8", "128,128") in gathered
  assert {size for _, size in gathered} == {"128,128", "4,128"}  # The other: scales.
  assert not re.search("all-(reduce|to-all)|permute|scatter", program.as_text())


@pytest.mark.parametrize("time", [4, 3])
def test_tokens_spread_over_context_or_stay_whole(time):
  x, leaves = normal(0, 2, time, 64), quantization.nf4(normal(1, 64, 128))
  loss = lambda multiply: lambda x: jnp.sum(jnp.sin(multiply(x, leaves)))
  with jax.set_mesh(sharding.make_mesh(fsdp=2, context=2)):
    got = jax.jit(jax.grad(loss(by_kernel)))(x)
  assert_near(got, jax.grad(loss(quantization.matmul))(x))


def test_rows_that_do_not_spread_over_a_mesh_are_refused():
  x, leaves = jnp.asarray(normal(0, 6, 1, 64)), quantization.nf4(normal(1, 64, 128))
  with jax.set_mesh(sharding.make_mesh(fsdp=4)):
    with pytest.raises(ValueError, match='spread 6 rows over the 4 .* take "xla"'):
      quantization.matmul(x, leaves, backend="pallas")


@pytest.mark.parametrize("shards", ["inputs", "outputs"])
def test_shards_of_weights_add_up(shards):
  mesh = sharding.make_mesh(fsdp=1, tensor=4)
  x, leaves = normal(0, 3, 256), quantization.nf4(normal(1, 256, 512))
  at = {
    "inputs": (P(None, "tensor"), P("tensor"), P()),
    "outputs": (P(), P(None, "tensor"), P(None, "tensor")),
  }[shards]

  def part(x, leaves):
    scale = leaves["block_scale"].astype(jnp.float32)
    y = nf4_kernel.matmul(x, leaves["codes"], scale, jnp.asarray(quantization.NF4))
    return jax.lax.psum(y, "tensor") if shards == "inputs" else y

  product = jax.shard_map(
    part, mesh=mesh, in_specs=at[:2], out_specs=at[2], check_vma=False
  )
  got, back = jax.vjp(jax.jit(lambda x: product(x, leaves)), x)
  kernel, g = quantization.dequantise(leaves), normal(2, 3, 512)
  assert_near(got, x @ kernel)
  assert_near(back(g)[0], g @ kernel.T)


def test_backends_that_do_not_fit_are_refused():
  x, leaves = jnp.asarray(normal(0, 1, 64)), quantization.int8(normal(1, 64, 8))
  with pytest.raises(ValueError, match='"pallas" is for NF4; int8.* wants "xla"'):
    by_kernel(x, leaves)
  with pytest.raises(ValueError, match=r"one of \['pallas', 'xla'\], not 'triton'"):
    quantization.matmul(x, leaves, backend="triton")
