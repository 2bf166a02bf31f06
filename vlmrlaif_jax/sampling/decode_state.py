"""Decoding state: rows of partial responses, with their KV cache in a ring buffer.

Rows start at different steps, but all write the same cache slot at each step. The slots
after the prompt are a ring buffer of length `max_new`, and a mask contains the slots of
each row. So no row waits for another, and a write requires no scatter.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlmrlaif_jax.core.types import Batch, Params, Stops, get_next_positions, is_stop
from vlmrlaif_jax.models.layers import KVCache
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.sampling.token_sampling import sample_token


class DecodeSettings(NamedTuple):
  """Settings of sampling; generate describes them."""

  max_new: int
  temperature: float | Float[Array, ""]  # An array must be above 0.
  top_p: float
  top_k: int
  stops: Stops
  pad: int
  vocab: int | None


class Sampler(NamedTuple):
  """A model with its variables and settings of sampling; see make_sampler."""

  model: VLM
  variables: Params
  settings: DecodeSettings
  layers: tuple[Params, ...] | None  # Parameters of each layer; see VLM.unstack_layers.


class ResponseRing(NamedTuple):
  """Sampled tokens. The columns of a row are a ring that starts at its first step."""

  first_step: Int[Array, " rows"]  # Step of the first token.
  tokens: Int[Array, "rows new"]
  mask: Bool[Array, "rows new"]  # True for sampled tokens, False for free columns.
  logps: Float[Array, "rows new"]  # Log-probabilities of the tokens, in nats.


class DecodeRows(NamedTuple):
  """A batch of partial responses with their caches."""

  responses: ResponseRing
  owner: Int[Array, " rows"]  # Number of the response, set by the caller.
  keys: Key[Array, " rows"]  # Random key of each response.
  done: Bool[Array, " rows"]  # True for rows that are complete or empty.
  next_position: Int[Array, " rows"]  # Position of the next token, on all axes.
  prompt_mask: Bool[Array, "rows start"]  # False for padding of the prompt.
  caches: tuple[KVCache, ...]  # One cache per layer.


def make_sampler(model: VLM, variables: Params, settings: DecodeSettings) -> Sampler:
  """Returns a sampler of a model, with unstacked layers if the model requires it."""
  layers = model.apply(variables, method="unstack_layers")
  return Sampler(model, variables, settings, layers)


def begin_rows(
  sampler: Sampler,
  prompts: Batch,
  keys: Key[Array, "batch samples"],
  step: Int[Array, ""] | int = 0,
  cache_len: int = 0,
) -> DecodeRows:
  """Runs prefill and returns rows with their first token, ordered by prompt.

  Args:
    sampler: the model and its settings.
    prompts: prompts with video features. A row without tokens is done.
    keys: random key of each sample of each prompt.
    step: step of the first token.
    cache_len: length of the caches in tokens; 0 for prompt length + max_new.
  """
  model, variables, settings, _ = sampler
  cache_len = cache_len or prompts.tokens.shape[1] + settings.max_new
  has_prompt = jnp.any(prompts.mask, axis=1)
  states = model.apply(variables, prompts, cache_len, method="prefill")
  position = get_next_positions(prompts)
  has_prompt, position, mask, (hidden, caches) = jax.tree.map(
    lambda x: jnp.repeat(x, keys.shape[1], axis=0),
    (has_prompt, position, prompts.mask, states),
  )
  shape = (keys.size, settings.max_new)
  responses = ResponseRing(
    first_step=jnp.full(keys.size, step),
    tokens=jnp.full(shape, settings.pad, prompts.tokens.dtype),
    mask=jnp.zeros(shape, bool),
    logps=jnp.zeros(shape),
  )
  owner, keys = jnp.arange(keys.size), keys.reshape(-1)
  rows = DecodeRows(responses, owner, keys, ~has_prompt, position, mask, caches)
  return _append_token(sampler, rows, hidden, jnp.int32(step))


def advance_rows(
  sampler: Sampler,
  rows: DecodeRows,
  step: Int[Array, ""],
  continue_fn: Callable[..., Bool[Array, ""] | bool] = lambda step, rows: True,
) -> tuple[Int[Array, ""], DecodeRows]:
  """Appends tokens to the rows that are not done, until all are done.

  Args:
    sampler: the model and its settings.
    rows: partial responses.
    step: the next step.
    continue_fn: function of the next step and the rows; False stops decoding.

  Returns:
    The next step, and the rows.
  """

  def decode_step(
    state: tuple[Int[Array, ""], DecodeRows],
  ) -> tuple[Int[Array, ""], DecodeRows]:
    step, rows = state
    last = (step - 1) % sampler.settings.max_new
    mask = jnp.concatenate([rows.prompt_mask, rows.responses.mask], axis=1)
    hidden, caches = sampler.model.bind(sampler.variables).decode(
      _take_column(rows.responses.tokens, last),
      rows.next_position - 1,
      rows.prompt_mask.shape[1] + last,
      mask,
      rows.caches,
      sampler.layers,
    )
    rows = rows._replace(caches=caches)
    return step + 1, _append_token(sampler, rows, hidden, step)

  is_running = lambda state: ~jnp.all(state[1].done) & continue_fn(*state)
  return jax.lax.while_loop(is_running, decode_step, (step, rows))


def _append_token(
  sampler: Sampler,
  rows: DecodeRows,
  hidden: Float[Array, "rows embed"],
  step: Int[Array, ""],
) -> DecodeRows:
  """Samples the next token of each row from the hidden state of its last token."""
  settings, responses = sampler.settings, rows.responses
  logits = sampler.model.bind(sampler.variables).compute_logits(hidden)
  allowed = logits
  if settings.vocab is not None:
    allowed = jnp.where(jnp.arange(logits.shape[1]) < settings.vocab, logits, -jnp.inf)
  number = step - responses.first_step
  token = sample_token(
    jax.vmap(jax.random.fold_in)(rows.keys, number),
    allowed,
    temperature=settings.temperature,
    top_p=settings.top_p,
    top_k=settings.top_k,
  )
  if isinstance(settings.temperature, jax.Array) or settings.temperature:
    logits /= settings.temperature
  picked = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  logp = picked - jax.nn.logsumexp(logits, axis=1)
  column = step % settings.max_new

  def put(x, new):  # Rows that are done do not change.
    new = jnp.where(rows.done, _take_column(x, column), new.astype(x.dtype))
    return jax.lax.dynamic_update_index_in_dim(x, new, column, axis=1)

  return rows._replace(
    responses=responses._replace(
      tokens=put(responses.tokens, token),
      mask=put(responses.mask, jnp.ones_like(rows.done)),
      logps=put(responses.logps, logp),
    ),
    done=rows.done | is_stop(token, settings.stops) | (number == settings.max_new - 1),
    next_position=rows.next_position + 1,
  )


def _take_column(x: Array, index: Int[Array, ""]) -> Array:
  return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def unroll_rings(rings: ResponseRing) -> ResponseRing:
  """Returns the rings rotated so that the first token is in the first column."""
  new = rings.tokens.shape[1]
  order = (rings.first_step[:, None] + jnp.arange(new)) % new
  rotate = lambda x: jnp.take_along_axis(x, order, axis=1)
  return ResponseRing(rings.first_step * 0, *map(rotate, rings[1:]))
