"""Token sampling: top-k and top-p truncation of logits, and a draw by inverse CDF."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def truncate_logits(
  logits: Float[Array, "*batch vocab"], *, top_p: float, top_k: int
) -> Float[Array, "*batch vocab"]:
  """Sets the logits of excluded tokens to -inf; ties with the last candidate remain.

  >>> print(truncate_logits(jnp.array([2.0, 1.0, 0.0]), top_p=1.0, top_k=2))
  [  2.   1. -inf]

  Args:
    logits: logits of the distribution.
    top_p: keep the most probable tokens whose probabilities sum to top_p (Holtzman et
      al. 2019, 1904.09751, section 3.1); 1 disables it.
    top_k: keep the top_k most probable tokens; 0 disables it. It is applied first.
  """
  if 0 < top_k < logits.shape[-1]:
    lowest = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  if top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    lowest = jnp.min(
      ranked, axis=-1, keepdims=True, where=before < top_p, initial=jnp.inf
    )
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  return logits


def sample_token(
  keys: Key[Array, " batch"],
  logits: Float[Array, "batch vocab"],
  *,
  temperature: float | Float[Array, ""],
  top_p: float = 1.0,
  top_k: int = 0,
) -> Int[Array, " batch"]:
  """Samples a token per row, each with its own key.

  Temperature 0 selects the most probable token. It must be a number, because an array
  is taken to be above 0.
  """
  if isinstance(temperature, float | int) and temperature == 0:
    return jnp.argmax(logits, axis=-1)
  logits = truncate_logits(logits / temperature, top_p=top_p, top_k=top_k)
  weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return inverse_cdf_sample(weights, jax.vmap(jax.random.uniform)(keys))


def inverse_cdf_sample(
  weights: Float[Array, "batch vocab"], share: Float[Array, " batch"]
) -> Int[Array, " batch"]:
  """Returns the first token whose cumulative weight exceeds a share of the total.

  The search is over blocks of about sqrt(vocab) tokens, then within a block. So each
  row requires one random number, where the Gumbel trick requires one per token, and
  cumulative sums are short.

  >>> print(inverse_cdf_sample(jnp.array([[1.0, 2.0, 1.0]]), jnp.array([0.5])))
  [1]
  """
  rows, vocab = weights.shape
  size = math.isqrt(vocab - 1) + 1
  blocks = jnp.pad(weights, [(0, 0), (0, -vocab % size)]).reshape(rows, -1, size)
  sums = jnp.sum(blocks, axis=2)
  block, rest = _search_cumulative(sums, share * jnp.sum(sums, axis=1))
  within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  place, _ = _search_cumulative(within, rest)
  return block * size + place


def _search_cumulative(
  weights: Float[Array, "batch parts"], amount: Float[Array, " batch"]
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
  """Returns the first part whose cumulative weight exceeds amount, and the rest.

  The rest is amount minus the weight of earlier parts. Parts of weight 0 are skipped.
  """
  cumulative = jnp.cumsum(weights, axis=1)
  # By rounding, amount may exceed the total, or a part of weight 0 may exceed amount.
  limit = cumulative[:, -1] * (1 - 1e-6)
  amount = jnp.minimum(amount, limit)
  part = jnp.argmax((cumulative > amount[:, None]) & (weights > 0), axis=1)
  pick = lambda x: jnp.take_along_axis(x, part[:, None], axis=1)[:, 0]
  return part, amount - (pick(cumulative) - pick(weights))
