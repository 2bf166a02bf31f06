"""Scores of responses that reach, or nearly reach, the maximum length."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def rank_truncated_last(
  scores: Float[Array, "prompts group"],
  valid: Bool[Array, "prompts group"],
  stopped: Bool[Array, "prompts group"],
) -> Float[Array, "prompts group"]:
  """Sets scores of responses without EOS to 1 below the lowest score of the group.

  Args:
    scores: scores of the responses.
    valid: whether a response has a score.
    stopped: whether a response has an EOS token.
  """
  lowest = jnp.min(scores, axis=1, keepdims=True, where=valid, initial=jnp.inf)
  return jnp.where(stopped | ~valid, scores, lowest - 1)


def soft_overlong_punishment(
  fill: Float[Array, "*batch"], *, share: float
) -> Float[Array, "*batch"]:
  """Computes DAPO's soft punishment of length, 0 to -1: 2503.14476, eq. 13.

    clip((1 - share - fill) / share, -1, 0)

  >>> print(soft_overlong_punishment(jnp.array([0.5, 0.8, 0.9, 1.0]), share=0.2))
  [ 0.   0.  -0.5 -1. ]

  Args:
    fill: length of a response divided by the maximum length.
    share: last part of the maximum length, in which the punishment rises. In the paper,
      4,096 of 20,480 tokens: 0.2.
  """
  return jnp.clip((1 - share - fill) / share, -1.0, 0.0)
