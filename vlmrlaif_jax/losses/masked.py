"""Means and whitening over the unmasked entries of padded arrays, in float32."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def masked_mean(
  x: Float[Array, "*batch time"], mask: Bool[Array | np.ndarray, "*batch time"]
) -> Float[Array, ""]:
  """Returns the mean of x over the True entries of mask, 0 for an empty mask.

  >>> x, mask = jnp.array([[1.0, 2.0], [6.0, 9.0]]), jnp.array([[1, 1], [1, 0]], bool)
  >>> print(masked_mean(x, mask), row_mean(x, mask))
  3.0 [1.5 6. ]
  """
  total = jnp.sum(x.astype(jnp.float32), where=mask)
  return total / jnp.maximum(jnp.sum(mask), 1)


def row_mean(
  x: Float[Array, "*batch time"], mask: Bool[Array | np.ndarray, "*batch time"]
) -> Float[Array, "*batch"]:
  """Returns the mean of each row over its True entries of mask, 0 for an empty row."""
  total = jnp.sum(x.astype(jnp.float32), axis=-1, where=mask)
  return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def masked_whiten(
  x: Float[Array, "*batch time"],
  mask: Bool[Array, "*batch time"],
  *,
  shift_mean: bool = True,
) -> Float[Array, "*batch time"]:
  """Scales x to mean 0 and variance 1 over mask; 0 outside mask.

    (x - mean) / (std + 1e-8), with the biased std (divided by n, not n - 1)

  Mean and std are over the whole array, so under jit over the rows of all devices.

  >>> print(masked_whiten(jnp.array([1.0, 3.0, 7.0]), jnp.array([True, True, False])))
  [-1.  1.  0.]

  Args:
    x: values of any unit; may be NaN outside mask.
    mask: True for the entries to whiten.
    shift_mean: False restores the mean, as is usual for rewards.
  """
  # Masked entries may be NaN, and 0 * NaN would reach the gradient of the square.
  x = jnp.where(mask, x.astype(jnp.float32), 0.0)
  mean = masked_mean(x, mask)
  variance = masked_mean(jnp.square(x - mean), mask)
  # The gradient of sqrt at 0 is infinite, so a variance of 0 is replaced by 1.
  spread = variance > 0
  std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)
  white = (x - mean) / (std + 1e-8)
  if not shift_mean:
    white += mean
  return jnp.where(mask, white, 0.0)
