"""Log-probabilities and entropies of logits that exist as one array."""

import jax
import jax.numpy as jnp


def target_logps(logits, targets):
  """Log p of the target at each position; video tokens are read as id 0."""
  logps = jax.nn.log_softmax(logits.astype(jnp.float32))
  ids = jnp.maximum(targets, 0)[..., None]
  return jnp.take_along_axis(logps, ids, axis=-1)[..., 0]


def token_logps(logits, tokens):
  """Log p of each token given those before it; 0 for the first."""
  logps = target_logps(logits[:, :-1], tokens[:, 1:])
  return jnp.pad(logps, [(0, 0), (1, 0)])


def entropy(logits):
  """Of the distribution at each position."""
  odds = jax.nn.softmax(logits.astype(jnp.float32))
  return -jnp.sum(odds * jnp.log(odds), axis=-1)
