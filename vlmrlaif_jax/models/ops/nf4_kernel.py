"""A product with an NF4 kernel that never stands in memory dequantised, for TPUs.

Each step reads a block of codes (quant.py has their form), makes weights of it in
vector memory and hands them to the matrix unit, beside whose work the next ones are
made. XLA makes all weights first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

_ROWS = 2048  # At most: more would not go into 16 MiB of vector memory.
_BLOCK = 512  # Inputs, and outputs, of a block of weights.
_SCALED = 64  # Inputs that share a scale: quant.BLOCK.
_LANES = 128  # Of a vector register, within which weights are looked up.


@jax.custom_vjp
def matmul(
  x: Float[Array, "rows inputs"],
  codes: UInt8[Array, "pairs outputs"],
  scale: Float[Array, "blocks outputs"],
  levels: Float[Array, "16"],
) -> Float[Array, "rows outputs"]:
  """x @ W in the dtype of x, for the W of quant.dequantise, rounded to that dtype.

  A gradient for x alone. XLA does not divide a kernel over a mesh: the arrays are of
  one device, or a jax.shard_map gives each its own, as quant.matmul does. Sum over
  shards of the inputs with jax.lax.psum; they are sharded by whole blocks.

  Args:
    scale: of each block of 64 inputs, in float32.
    levels: what the codes stand for.
  """
  return _product(x, codes, scale, levels, transpose=False)


def _forward(x, *frozen):
  return matmul(x, *frozen), frozen


def _backward(frozen, g):
  return _product(g, *frozen, transpose=True), None, None, None


matmul.defvjp(_forward, _backward)


def _product(x, codes, scale, levels, *, transpose):
  """x @ W, or x @ W' of the same codes."""
  rows, summed = x.shape
  inputs, outputs = 2 * codes.shape[0], codes.shape[1]
  kept = inputs if transpose else outputs
  count = -(-rows // _ROWS)
  tall = -(-rows // (16 * count)) * 16  # Blocks of one height, in tiles of 16.
  x = jnp.pad(x, [(0, -rows % 16), (0, 0)])  # Not all compiles with part of a tile.
  # Blocks reach over the edges of W, where codes are anything: of scale 0.
  scale = jnp.pad(scale, [(0, -inputs % _BLOCK // _SCALED), (0, -outputs % _BLOCK)])
  table = jnp.tile(levels, (_SCALED // 2, _LANES // len(levels)))
  of_weights = (lambda i, j, k: (j, k)) if transpose else (lambda i, j, k: (k, j))
  out = pl.pallas_call(
    functools.partial(_step, summed=summed, transpose=transpose),
    grid=(count, -(-kept // _BLOCK), -(-summed // _BLOCK)),
    in_specs=[
      pl.BlockSpec((tall, _BLOCK), lambda i, j, k: (i, k)),
      pl.BlockSpec((_BLOCK // 2, _BLOCK), of_weights),
      pl.BlockSpec((_BLOCK // _SCALED, _BLOCK), of_weights),
      pl.BlockSpec(table.shape, lambda i, j, k: (0, 0)),
    ],
    out_specs=pl.BlockSpec((tall, _BLOCK), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((len(x), kept), x.dtype),
    scratch_shapes=[pltpu.VMEM((tall, _BLOCK), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    name="nf4_matmul",
  )(x, codes, scale, table)
  return out[:rows]


def _step(x, codes, scale, table, out, total, *, summed, transpose):
  """Adds a block of x times one of W to the total of a block of the output."""
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  rows = x[...]
  if summed % _BLOCK:  # Over the edge of x stands anything: NaN x 0 is not 0.
    column = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    rows = jnp.where(column < summed - k * _BLOCK, rows, 0)
  weights = _weights(codes[...], scale[...], table[...], rows.dtype)
  over = (((1,), (1 if transpose else 0,)), ((), ()))
  total[...] += jax.lax.dot_general(
    rows, weights, over, preferred_element_type=jnp.float32
  )

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    out[...] = total[...].astype(out.dtype)


def _weights(codes, scale, table, dtype):
  """quant.dequantise of a block; each row of the table holds the levels, repeated."""
  blocks = []
  for i, block in enumerate(jnp.split(codes.astype(jnp.int32), len(scale))):
    for half in (block & 15, block >> 4):
      # Rounded piece by piece: compilers make more of it than of the whole.
      blocks.append((_look_up(half, table) * scale[i : i + 1]).astype(dtype))
  return jnp.concatenate(blocks)


def _look_up(
  codes: Int[Array, "pairs outputs"], table: Float[Array, "pairs lanes"]
) -> Float[Array, "pairs outputs"]:
  """The level of each code: a permutation of lanes, the only gather TPUs do fast."""
  pieces = jnp.split(codes, codes.shape[1] // table.shape[1], axis=1)
  take = functools.partial(jnp.take_along_axis, table, axis=1)
  return jnp.concatenate([take(p, mode="promise_in_bounds") for p in pieces], axis=1)
