"""Creates random arrays of given shapes, to run a model without a checkpoint."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from vlmrlaif_jax.core import sharding

# With these, kernels have a standard deviation of 0.02, quantized or not.
_FILL = {"scale": 1.0, "block_scale": 0.04, "channel_scale": 2.7e-4}


def make_random_arrays(shapes: PyTree) -> PyTree:
  """Creates arrays of given shapes on the devices, leaf by leaf.

  Weights are random, because a chip is faster with zeros than with trained weights.
  Integers are ids of text tokens; booleans are True.
  """

  def make_leaf(path, leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.device_put(jax.random.key(0), leaf.sharding)
    name = sharding.format_key_path(path)
    key = jax.random.key(zlib.crc32(name.encode()))
    return _fill_array(key, name.split("/")[-1], leaf.shape, leaf.dtype, leaf.sharding)

  return jax.tree_util.tree_map_with_path(make_leaf, shapes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _fill_array(
  key: Key[Array, ""], name: str, shape: tuple[int, ...], dtype: Any, where: Any
) -> Array:
  if name in _FILL:
    array = jnp.full(shape, _FILL[name], dtype)
  elif name == "codes":
    array = jax.random.bits(key, shape, jnp.uint8).astype(dtype)
  elif jnp.issubdtype(dtype, jnp.bool_):
    array = jnp.ones(shape, bool)
  elif jnp.issubdtype(dtype, jnp.integer):
    array = jax.random.randint(key, shape, 3, 60, dtype)
  else:
    array = 0.02 * jax.random.normal(key, shape, dtype)
  return array if where is None else jax.lax.with_sharding_constraint(array, where)
