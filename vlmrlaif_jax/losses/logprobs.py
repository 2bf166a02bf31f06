"""Log-probabilities and entropies of tokens, from hidden states, in float32.

Logits are computed in chunks of time steps, because all of them do not fit in memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def sum_logps(
  logps: Float[Array, "*batch time"], mask: Bool[Array | np.ndarray, "*batch time"]
) -> Float[Array, "*batch"]:
  """Returns the log-probability of each response: the sum of logps over mask."""
  return jnp.sum(logps.astype(jnp.float32), axis=-1, where=mask)


def chunked_token_logps(
  hidden: Float[Array, "*batch time embed"],
  head: Float[Array, "embed vocab"],
  tokens: Int[Array | np.ndarray, "*batch time"],
  *,
  chunk: int,
) -> Float[Array, "*batch time"]:
  """Computes logps[t] = log p(tokens[t] | tokens[<t]) in nats; logps[0] is 0.

  `chunked_target_logps` describes the arguments.

  >>> hidden, head = jnp.zeros((3, 2)), jnp.zeros((2, 4))
  >>> print(chunked_token_logps(hidden, head, jnp.array([1, 2, 3]), chunk=2))
  [ 0.    -1.386 -1.386]
  """
  targets = jnp.pad(tokens[..., 1:], _make_end_padding(tokens, 1))
  logps, _ = chunked_target_logps(hidden, head, targets, chunk=chunk)
  return jnp.pad(logps[..., :-1], [(0, 0)] * (logps.ndim - 1) + [(1, 0)])


def chunked_target_logps(
  hidden: Float[Array, "*batch time embed"],
  head: Float[Array, "embed vocab"],
  targets: Int[Array | np.ndarray, "*batch time"],
  *,
  chunk: int,
  temperature: float = 1.0,
) -> tuple[Float[Array, "*batch time"], Float[Array, "*batch time"]]:
  """Computes log-probability and entropy in nats, where hidden[t] predicts targets[t].

  Both are of softmax(hidden @ head / temperature). Only the logits of `chunk` time
  steps are in memory, and the backward pass recomputes them. The steps of a chunk have
  equal distances over the whole length. So if time is sharded and `chunk` is a multiple
  of the shards, each device has a share of every chunk, and no hidden state is moved.

  Args:
    hidden: last hidden states, after the final norm.
    head: matrix from hidden states to logits.
    targets: token ids. A video token (-1) counts as id 0 and must be masked.
    chunk: time steps whose logits are computed together; need not divide the length.
    temperature: sampling temperature that the log-probabilities refer to.

  Raises:
    ValueError: `chunk` is below 1.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be 1 or more time steps, not {chunk}")
  *batch, time, _ = hidden.shape
  rank = len(batch)
  chunk = min(chunk, time)
  extra = -time % chunk
  hidden = jnp.pad(hidden, [*_make_end_padding(targets, extra), (0, 0)])
  targets = jnp.pad(targets, _make_end_padding(targets, extra))

  def score_chunk(part):
    hidden, targets = part
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    logits = logits / temperature
    at = jnp.maximum(targets, 0)[..., None]  # Video tokens are below 0.
    picked = jnp.take_along_axis(logits, at, axis=-1)[..., 0]
    target_logps = picked - jax.nn.logsumexp(logits, axis=-1)
    logps = jax.nn.log_softmax(logits, axis=-1)
    # An excluded token has logit -inf, and 0 * -inf would be NaN.
    logps = jnp.maximum(logps, jnp.finfo(jnp.float32).min)
    return target_logps, -jnp.sum(jnp.exp(logps) * logps, axis=-1)

  def fold(x):
    """Reshapes [*batch time ...] to [chunks *batch chunk ...]: 012345 to 024, 135."""
    x = x.reshape(*batch, chunk, -1, *x.shape[rank + 1 :])
    return jnp.moveaxis(x, rank + 1, 0)

  def unfold(x):
    """Reshapes [chunks *batch chunk] to [*batch time]."""
    return jnp.moveaxis(x, 0, rank + 1).reshape(*batch, -1)[..., :time]

  # Inside a scan, XLA cannot merge the recomputation with the forward pass (CSE).
  score_chunk = jax.checkpoint(score_chunk, prevent_cse=False)
  logps, entropy = jax.lax.map(score_chunk, (fold(hidden), fold(targets)))
  return unfold(logps), unfold(entropy)


def _make_end_padding(
  tokens: Int[Array | np.ndarray, "*batch time"], count: int
) -> list[tuple[int, int]]:
  """Returns the padding widths that append `count` time steps."""
  return [(0, 0)] * (tokens.ndim - 1) + [(0, count)]
