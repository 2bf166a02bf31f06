"""Rows of a cache that are in the middle of responses, and one more token in each.

Rows begin at different times, yet all write to one slot in each step: behind the
prompts the slots are a ring as long as the longest response, and the mask says which of
them a row's tokens are in. So no row waits for another, and none has to be scattered.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlmrlaif_jax.core.types import Batch, Params
from vlmrlaif_jax.models.layers import KVCache
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.sampling.token_sampling import sample_token


class DecodeSettings(NamedTuple):
  """How responses are sampled; see generate."""

  max_new: int
  temperature: float | Float[Array, ""]  # An array is above 0.
  top_p: float
  top_k: int
  eos: int
  pad: int
  vocab: int | None


class Sampler(NamedTuple):
  """A model and how it is sampled; see `sampler_of`."""

  model: VLM
  variables: Params
  settings: DecodeSettings
  layers: tuple[Params, ...] | None  # See VLM.unstacked.


class ResponseRing(NamedTuple):
  """Sampled tokens; the columns of a response are a ring."""

  begun: Int[Array, " rows"]  # The step of the first token.
  tokens: Int[Array, "rows new"]
  kept: Bool[Array, "rows new"]  # Of the response; the rest of the ring is empty.
  logps: Float[Array, "rows new"]


class DecodeRows(NamedTuple):
  """Responses in the making."""

  said: ResponseRing
  owner: Int[Array, " rows"]  # Which response this is, for the caller.
  keys: Key[Array, " rows"]
  done: Bool[Array, " rows"]
  prompt: Bool[Array, "rows start"]  # Its real tokens.
  caches: tuple[KVCache, ...]


def make_sampler(model: VLM, variables: Params, settings: DecodeSettings) -> Sampler:
  """Returns a sampler of the model's whole variables."""
  layers = model.apply(variables, method="unstacked")
  return Sampler(model, variables, settings, layers)


def begin_rows(
  sampler: Sampler,
  prompts: Batch,
  keys: Key[Array, "batch samples"],
  step: Int[Array, ""] | int = 0,
  slots: int = 0,
) -> DecodeRows:
  """Rows with their first token, those of one prompt together; it is read once.

  Args:
    prompts: with features for videos. One without a token is done.
    keys: of each sample of each prompt.
    step: the first token's.
    slots: of the caches; 0 for those of the prompt and the longest response.
  """
  model, variables, settings, _ = sampler
  slots = slots or prompts.tokens.shape[1] + settings.max_new
  asked = jnp.any(prompts.mask, axis=1)
  read = model.apply(variables, prompts, slots, method="prefill")
  asked, mask, (hidden, caches) = jax.tree.map(
    lambda x: jnp.repeat(x, keys.shape[1], axis=0), (asked, prompts.mask, read)
  )
  shape = (keys.size, settings.max_new)
  said = ResponseRing(
    begun=jnp.full(keys.size, step),
    tokens=jnp.full(shape, settings.pad, prompts.tokens.dtype),
    kept=jnp.zeros(shape, bool),
    logps=jnp.zeros(shape),
  )
  owner = jnp.arange(keys.size)
  rows = DecodeRows(said, owner, keys.reshape(-1), ~asked, mask, caches)
  return _sampled(sampler, rows, hidden, jnp.int32(step))


def advance_rows(
  sampler: Sampler,
  rows: DecodeRows,
  step: Int[Array, ""],
  goes_on: Callable[..., Bool[Array, ""] | bool] = lambda step, rows: True,
) -> tuple[Int[Array, ""], DecodeRows]:
  """Adds tokens to the rows that are not done, until all are.

  Args:
    step: the next.
    goes_on: from the next step and the rows to whether to take it, unless all are done.

  Returns:
    The next step, and the rows.
  """

  def add(now: tuple[Int[Array, ""], DecodeRows]) -> tuple[Int[Array, ""], DecodeRows]:
    step, rows = now
    last = (step - 1) % sampler.settings.max_new
    mask = jnp.concatenate([rows.prompt, rows.said.kept], axis=1)
    hidden, caches = sampler.model.bind(sampler.variables).decode(
      _column(rows.said.tokens, last),
      jnp.sum(mask, axis=1) - 1,
      rows.prompt.shape[1] + last,
      mask,
      rows.caches,
      sampler.layers,
    )
    rows = rows._replace(caches=caches)
    return step + 1, _sampled(sampler, rows, hidden, step)

  more = lambda now: ~jnp.all(now[1].done) & goes_on(*now)
  return jax.lax.while_loop(more, add, (step, rows))


def _sampled(
  sampler: Sampler,
  rows: DecodeRows,
  hidden: Float[Array, "rows embed"],
  step: Int[Array, ""],
) -> DecodeRows:
  """The rows with a token that the hidden state of the last one leads to."""
  settings, said = sampler.settings, rows.said
  logits = sampler.model.bind(sampler.variables).logits_of(hidden)
  known = logits
  if settings.vocab is not None:
    known = jnp.where(jnp.arange(logits.shape[1]) < settings.vocab, logits, -jnp.inf)
  number = step - said.begun
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
    said=said._replace(
      tokens=put(said.tokens, token),
      kept=put(said.kept, jnp.ones_like(rows.done)),
      logps=put(said.logps, logp),
    ),
    done=rows.done | (token == settings.eos) | (number == settings.max_new - 1),
  )


def _column(x: Array, index: Int[Array, ""]) -> Array:
  return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def unroll_rings(found: ResponseRing) -> ResponseRing:
  """The rings cut where they begin, so that the first token is in the first column."""
  new = found.tokens.shape[1]
  order = (found.begun[:, None] + jnp.arange(new)) % new
  cut = lambda x: jnp.take_along_axis(x, order, axis=1)
  return ResponseRing(found.begun * 0, *map(cut, found[1:]))
