"""Drawing a token from logits: what is left to choose from, and the choice."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def truncate_logits(
  logits: Float[Array, "*batch vocab"], *, top_p: float, top_k: int
) -> Float[Array, "*batch vocab"]:
  """-inf wherever a token is not to be sampled; ties with the last one stay.

  Args:
    logits: of the distribution to be cut.
    top_p: keep the likeliest tokens that together reach this probability (Holtzman
      et al. 2019, 1904.09751); 1 keeps all.
    top_k: keep this many tokens at most; 0 keeps all. It is applied first.
  """
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.min(
      ranked, axis=-1, keepdims=True, where=before < top_p, initial=jnp.inf
    )
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def sample_token(
  keys: Key[Array, " batch"],
  logits: Float[Array, "batch vocab"],
  *,
  temperature: float | Float[Array, ""],
  top_p: float = 1.0,
  top_k: int = 0,
) -> Int[Array, " batch"]:
  """One token a row, each by a key of its own; the likeliest at temperature 0, which
  has to be a number: an array is above it.
  """
  if isinstance(temperature, float | int) and temperature == 0:
    return jnp.argmax(logits, axis=-1)
  logits = truncate_logits(logits / temperature, top_p=top_p, top_k=top_k)
  weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return inverse_cdf_sample(weights, jax.vmap(jax.random.uniform)(keys))


def inverse_cdf_sample(
  weights: Float[Array, "batch vocab"], share: Float[Array, " batch"]
) -> Int[Array, " batch"]:
  """The first token up to which more than a share of the weights lies.

  By blocks of some sqrt(vocab) tokens, then within one: one number a row is drawn and
  not one a token, as for the largest of logits with Gumbel noise, and no cumulative sum
  is long.
  """
  rows, vocab = weights.shape
  size = math.isqrt(vocab - 1) + 1
  blocks = jnp.pad(weights, [(0, 0), (0, -vocab % size)]).reshape(rows, -1, size)
  sums = jnp.sum(blocks, axis=2)
  block, left = _first_beyond(sums, share * jnp.sum(sums, axis=1))
  within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  place, _ = _first_beyond(within, left)
  return block * size + place


def _first_beyond(
  weights: Float[Array, "batch parts"], amount: Float[Array, " batch"]
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
  """The first part, of some weight, up to which more than amount lies; and what of the
  amount lies in it.
  """
  upto = jnp.cumsum(weights, axis=1)
  # Rounding may take the amount beyond all, or a sum beyond it where nothing is added.
  most = upto[:, -1] * (1 - 1e-6)
  amount = jnp.minimum(amount, most)
  part = jnp.argmax((upto > amount[:, None]) & (weights > 0), axis=1)
  pick = lambda x: jnp.take_along_axis(x, part[:, None], axis=1)[:, 0]
  return part, amount - (pick(upto) - pick(weights))
