"""Weights of tokens in the mean of a policy loss.

Every function takes (mask, max_new): True for the tokens of responses, and the maximum
length of a response. It returns the weight of each token and the divisor of the
weighted sum.
"""

from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Weights: TypeAlias = tuple[Float[Array, "*batch time"], Float[Array, ""]]


def response_weights(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  """Weighs for GRPO (2402.03300, eq. 3): mean over responses of the mean over tokens.

  >>> weights, divisor = response_weights(jnp.array([[1, 1], [1, 0]], bool), 2)
  >>> print(weights, divisor)
  [[0.5 0.5]
   [1.  0. ]] 2.0
  """
  length = jnp.sum(mask, axis=-1, keepdims=True)
  return mask / jnp.maximum(length, 1), jnp.sum(length > 0).astype(jnp.float32)


def token_weights(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  """Weighs for DAPO (2503.14476, section 3.3): mean over all tokens."""
  return mask.astype(jnp.float32), jnp.sum(mask).astype(jnp.float32)


def constant_weights(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  """Weighs for Dr. GRPO (2503.20783, section 3.2): mean of token sums / max_new."""
  _, count = response_weights(mask, max_new)
  return mask / max_new, count
