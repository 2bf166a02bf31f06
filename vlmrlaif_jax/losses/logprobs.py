"""From logits to log-probabilities and entropies of given tokens, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def sum_logps(
  logps: Float[Array, "*batch time"], mask: Bool[Array | np.ndarray, "*batch time"]
) -> Float[Array, "*batch"]:
  """Log-probability of each whole response: the sum of logps over mask."""
  return jnp.sum(logps.astype(jnp.float32), axis=-1, where=mask)


def chunked_token_logps(
  hidden: Float[Array, "*batch time embed"],
  head: Float[Array, "embed vocab"],
  tokens: Int[Array | np.ndarray, "*batch time"],
  *,
  chunk: int,
) -> Float[Array, "*batch time"]:
  """Log-probability, in nats, of each token: logps[t] = log p(tokens[t] | tokens[<t]).

  For the arguments, see `chunked_target_logps`. Nothing predicts the first token:
  logps[0] = 0.
  """
  targets = jnp.pad(tokens[..., 1:], _at_the_end(tokens, 1))
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
  """Log-probability and entropy, in nats, where hidden[t] predicts targets[t].

  Both are of logits = hidden @ head / temperature. The logits exist for `chunk` time
  steps at once, and again, recomputed, in the backward pass: 32000 logits a token
  would outweigh the rest of the activations. The steps of a chunk are spread over the
  whole length. So where time is spread over devices, of which `chunk` is a multiple,
  each has its share of every chunk and moves no hidden state.

  Args:
    hidden: the last hidden states, after the final norm.
    head: the matrix from hidden states to logits.
    targets: ids. Video tokens (-1) are read as id 0: mask them.
    chunk: time steps at once. Need not divide the length.
    temperature: of the sampling that the log-probabilities are to speak of.

  Returns:
    (logps, entropy).
  """
  if chunk < 1:
    raise ValueError(f"chunk must be 1 or more time steps, not {chunk}")
  *batch, time, _ = hidden.shape
  rank = len(batch)
  chunk = min(chunk, time)
  extra = -time % chunk
  hidden = jnp.pad(hidden, [*_at_the_end(targets, extra), (0, 0)])
  targets = jnp.pad(targets, _at_the_end(targets, extra))

  def of_chunk(part):
    hidden, targets = part
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    logits = logits / temperature
    at = jnp.maximum(targets, 0)[..., None]  # Video tokens are below 0.
    picked = jnp.take_along_axis(logits, at, axis=-1)[..., 0]
    said = picked - jax.nn.logsumexp(logits, axis=-1)
    logps = jax.nn.log_softmax(logits, axis=-1)
    # A forbidden token has logit -inf; 0 * -inf would be NaN.
    logps = jnp.maximum(logps, jnp.finfo(jnp.float32).min)
    return said, -jnp.sum(jnp.exp(logps) * logps, axis=-1)

  def fold(x):
    """[*batch time ...] -> [chunks *batch chunk ...]: 012345 -> 024, 135."""
    x = x.reshape(*batch, chunk, -1, *x.shape[rank + 1 :])
    return jnp.moveaxis(x, rank + 1, 0)

  def unfold(x):
    """[chunks *batch chunk] -> [*batch time]."""
    return jnp.moveaxis(x, 0, rank + 1).reshape(*batch, -1)[..., :time]

  # A scan runs its body once for both passes, so nothing needs guarding from CSE.
  of_chunk = jax.checkpoint(of_chunk, prevent_cse=False)
  logps, entropy = jax.lax.map(of_chunk, (fold(hidden), fold(targets)))
  return unfold(logps), unfold(entropy)


def _at_the_end(
  tokens: Int[Array | np.ndarray, "*batch time"], count: int
) -> list[tuple[int, int]]:
  """Padding widths that lengthen time by count."""
  return [(0, 0)] * (tokens.ndim - 1) + [(0, count)]
