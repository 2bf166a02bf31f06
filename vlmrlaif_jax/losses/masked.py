"""Reductions over the real entries of a padded array, in float32."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def masked_mean(
  x: Float[Array, "*batch time"], mask: Bool[Array | np.ndarray, "*batch time"]
) -> Float[Array, ""]:
  """Mean of x over all True entries of mask; 0 where there are none."""
  total = jnp.sum(x.astype(jnp.float32), where=mask)
  return total / jnp.maximum(jnp.sum(mask), 1)


def row_mean(
  x: Float[Array, "*batch time"], mask: Bool[Array | np.ndarray, "*batch time"]
) -> Float[Array, "*batch"]:
  """Mean of each row of x over the True entries of its mask; 0 of an empty row."""
  total = jnp.sum(x.astype(jnp.float32), axis=-1, where=mask)
  return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def masked_whiten(
  x: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
  *,
  shift_mean: bool = True,
) -> Float[Array, "*batch time"]:
  """Scales x to unit variance over mask, and to zero mean; 0 outside mask.

    (x - mean) / (std + 1e-8), with the biased std (division by n, not n - 1)

  Mean and std are over the whole array: under jit, over every device's rows.

  Args:
    x: may be NaN outside mask.
    mask: the entries that count.
    shift_mean: False puts the mean back, as is done for rewards.
  """
  # Masked entries may be NaN, and 0 * NaN would reach the gradient of the square.
  x = jnp.where(mask, x.astype(jnp.float32), 0.0)
  mean = masked_mean(x, mask)
  variance = masked_mean(jnp.square(x - mean), mask)
  # The slope of sqrt at 0 is infinite: take the root of something else there.
  spread = variance > 0
  std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)
  white = (x - mean) / (std + 1e-8)
  if not shift_mean:
    white += mean
  return jnp.where(mask, white, 0.0)
