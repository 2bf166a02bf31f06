"""Pooling of squares of patches by sums over two sources on each axis."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def list_bilinear(
  size: int,
) -> tuple[Int[np.ndarray, "half 2"], Float[np.ndarray, "half 2"]]:
  """Returns the sources of bilinear pooling on one axis, and their weights.

  It is interpolation to half the size, rounded up, without aligned corners.

  >>> print(list_bilinear(3)[1])
  [[0.75 0.25]
   [0.25 0.75]]
  """
  half = -(-size // 2)
  at = np.maximum((np.arange(half) + 0.5) * size / half - 0.5, 0)
  first = np.floor(at).astype(int)
  weight = at - first
  index = np.stack([first, np.minimum(first + 1, size - 1)], axis=1)
  return index, np.stack([1 - weight, weight], axis=1).astype(np.float32)


def list_average(
  size: int,
) -> tuple[Int[np.ndarray, "half 2"], Float[np.ndarray, "half 2"]]:
  """Returns the sources of average pooling of pairs; an odd last source is unused."""
  index = np.arange(size // 2 * 2).reshape(-1, 2)
  return index, np.full(index.shape, 0.5, np.float32)


def list_identity(
  size: int,
) -> tuple[Int[np.ndarray, "size 2"], Float[np.ndarray, "size 2"]]:
  """Returns the sources of features that are not pooled."""
  index = np.repeat(np.arange(size)[:, None], 2, axis=1)
  return index, np.tile(np.array([1, 0], np.float32), (size, 1))


# Name of a pooling in the LLaVA repository -> function from a number of patches to the
# sources of each pooled feature on one axis.
POOLINGS = {"bilinear": list_bilinear, "average": list_average}


def pool_patches(
  x: Float[Array, "images rows columns embed"],
  index: Int[np.ndarray, "pooled 2"],
  weight: Float[np.ndarray, "pooled 2"],
) -> Float[Array, "images pooled pooled embed"]:
  """Returns the weighted sums of the sources of POOLINGS, computed in float32."""
  matrix = np.zeros((len(index), x.shape[1]), np.float32)
  np.add.at(matrix, (np.arange(len(index))[:, None], index), weight)
  pooled = jnp.einsum(
    "ri,cj,nije->nrce",
    matrix,
    matrix,
    x.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return pooled.astype(x.dtype)
