"""Rows of a cache that are in the middle of responses, and one more token in each.

Rows begin at different times, yet all write to one slot in each step: behind the
prompts the slots are a ring as long as the longest response, and the mask says which of
them a row's tokens are in. So no row waits for another, and none has to be scattered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from vlmrlaif_jax.core.types import Batch, Params
from vlmrlaif_jax.models.layers import KVCache
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.sampling.token_sampling import sample_token


class Settings(NamedTuple):
  """How responses are sampled; see generate."""

  max_new: int
  temperature: float | Float[Array, ""]  # An array is above 0.
  top_p: float
  top_k: int
  eos: int
  pad: int
  vocab: int | None


class Rows(NamedTuple):
  """Responses in the making; the columns of a response are a ring."""

  begun: Int[Array, " rows"]  # The step of the first token.
  owner: Int[Array, " rows"]  # Which response this is, for the caller.
  keys: Key[Array, " rows"]
  tokens: Int[Array, "rows new"]
  kept: Bool[Array, "rows new"]  # Of the response; the rest of the ring is empty.
  logps: Float[Array, "rows new"]
  done: Bool[Array, " rows"]
  prompt: Bool[Array, "rows start"]  # Its real tokens.
  caches: tuple[KVCache, ...]  # Of start + new slots; of `start` in new rows.


def begin(
  model: VLM,
  variables: Params,
  prompts: Batch,
  keys: Key[Array, "batch samples"],
  owners: Int[Array, "batch samples"],
  step: Int[Array, ""],
  settings: Settings,
  *,
  slots: int,
) -> Rows:
  """Rows with their first token, those of one prompt together; it is read once.

  Args:
    step: the first token's.
    slots: of the caches.
  """
  asked = jnp.any(prompts.mask, axis=1)
  read = model.apply(variables, prompts, slots, method="prefill")
  asked, mask, (hidden, caches) = jax.tree.map(
    lambda x: jnp.repeat(x, keys.shape[1], axis=0), (asked, prompts.mask, read)
  )
  shape = (keys.size, settings.max_new)
  rows = Rows(
    begun=jnp.full(keys.size, step),
    owner=owners.reshape(-1),
    keys=keys.reshape(-1),
    tokens=jnp.full(shape, settings.pad, prompts.tokens.dtype),
    kept=jnp.zeros(shape, bool),
    logps=jnp.zeros(shape),
    done=~asked,
    prompt=mask,
    caches=caches,
  )
  return _sampled(model, variables, rows, hidden, step, settings)


def advance(
  model: VLM,
  variables: Params,
  rows: Rows,
  step: Int[Array, ""],
  settings: Settings,
  layers: tuple[Params, ...] | None,
) -> Rows:
  """The rows with one more token in each that is not done.

  Args:
    layers: what the model's `unstacked` has made, if anything.
  """
  last = (step - 1) % settings.max_new
  mask = jnp.concatenate([rows.prompt, rows.kept], axis=1)
  hidden, caches = model.bind(variables).decode(
    _column(rows.tokens, last),
    jnp.sum(mask, axis=1) - 1,
    rows.prompt.shape[1] + last,
    mask,
    rows.caches,
    layers,
  )
  rows = rows._replace(caches=caches)
  return _sampled(model, variables, rows, hidden, step, settings)


def _sampled(
  model: VLM,
  variables: Params,
  rows: Rows,
  hidden: Float[Array, "rows embed"],
  step: Int[Array, ""],
  settings: Settings,
) -> Rows:
  """The rows with a token that the hidden state of the last one leads to."""
  logits = model.bind(variables).logits_of(hidden)
  known = logits
  if settings.vocab is not None:
    known = jnp.where(jnp.arange(logits.shape[1]) < settings.vocab, logits, -jnp.inf)
  number = step - rows.begun
  token = sample_token(
    jax.vmap(jax.random.fold_in)(rows.keys, number),
    known,
    temperature=settings.temperature,
    top_p=settings.top_p,
    top_k=settings.top_k,
  )
  if isinstance(settings.temperature, jax.Array) or settings.temperature:
    logits /= settings.temperature
  picked = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  logp = picked - jax.nn.logsumexp(logits, axis=1)
  column = step % settings.max_new

  def put(x, new):  # What is done stays as it is.
    new = jnp.where(rows.done, _column(x, column), new.astype(x.dtype))
    return jax.lax.dynamic_update_index_in_dim(x, new, column, axis=1)

  return rows._replace(
    tokens=put(rows.tokens, token),
    kept=put(rows.kept, jnp.ones_like(rows.done)),
    logps=put(rows.logps, logp),
    done=rows.done | (token == settings.eos) | (number == settings.max_new - 1),
  )


def _column(x: Array, index: Int[Array, ""]) -> Array:
  return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


class Responses(NamedTuple):
  """What was sampled, in rings as those of Rows."""

  begun: Int[Array, " rows"]
  tokens: Int[Array, "rows new"]
  kept: Bool[Array, "rows new"]
  logps: Float[Array, "rows new"]


def responses(rows: Rows) -> Responses:
  """What the rows hold, done or not."""
  return Responses(rows.begun, rows.tokens, rows.kept, rows.logps)


def unrolled(found: Responses) -> Responses:
  """The rings cut where they begin, so that the first token is in the first column."""
  new = found.tokens.shape[1]
  order = (found.begun[:, None] + jnp.arange(new)) % new
  cut = lambda x: jnp.take_along_axis(x, order, axis=1)
  return Responses(found.begun * 0, *map(cut, found[1:]))


def replaced(
  old: PyTree, new: PyTree, source: Int[Array, " rows"], taken: Bool[Array, " rows"]
) -> PyTree:
  """Arrays with other rows in the place of some of theirs.

  Args:
    source: which row of new one becomes,
    taken: where it does.
  """

  def choose(old, new):
    where = taken.reshape(-1, *[1] * (old.ndim - 1))
    return jnp.where(where, new[source], old)

  return jax.tree.map(choose, old, new)


def put(
  rows: Rows, new: Rows, source: Int[Array, " rows"], taken: Bool[Array, " rows"]
) -> Rows:
  """As replaced, with caches of which the new ones hold no more than prompts."""
  start = rows.prompt.shape[1]
  # What stands behind a prompt is masked, whoever it is of.
  prompts = jax.tree.map(lambda x: x[:, :, :start], rows.caches)
  prompts = replaced(prompts, new.caches, source, taken)
  caches = jax.tree.map(lambda x, y: x.at[:, :, :start].set(y), rows.caches, prompts)
  rest = replaced(rows._replace(caches=()), new._replace(caches=()), source, taken)
  return rest._replace(caches=caches)
