"""Continuous batching: when a response ends, its row is refilled with the next prompt.

`generate_continuously` is one program with fixed shapes, so the host does not wait for
the device between responses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from vlmrlaif_jax.core.types import Batch
from vlmrlaif_jax.models.ops.activation_sharding import BATCH_AXES, axis_size, constrain
from vlmrlaif_jax.sampling.decode_state import (
  DecodeRows,
  ResponseRing,
  Sampler,
  advance_rows,
  begin_rows,
  unroll_rings,
)

_REFILL_PARTS = 4  # Prefill runs when 1 / _REFILL_PARTS of a shard's rows are done.


class _PromptQueue(NamedTuple):
  """Waiting prompts, with a leading axis of shards.

  Each shard of rows has its own queue, so that devices exchange only counts.
  """

  prompts: Batch
  keys: Key[Array, "shards prompts samples"]
  order: Int[Array, "shards prompts"]  # Row numbers; rows of padding alone are last.
  total: Int[Array, " shards"]  # Number of prompts that are not padding alone.
  lanes: int  # Prompts per shard in a prefill.


class _LoopState(NamedTuple):
  """State of the loop over prefill and decoding."""

  step: Int[Array, ""]  # The next step.
  taken: Int[Array, " shards"]  # Number of prompts that have started.
  rows: DecodeRows
  stored: ResponseRing  # Responses of all prompts, with a leading axis of shards.


def generate_continuously(
  sampler: Sampler, prompts: Batch, keys: Key[Array, "batch samples"], slots: int
) -> ResponseRing:
  """Samples responses to all prompts with `slots` rows of the cache.

  Args:
    sampler: the model and its settings.
    prompts: prompts with video features.
    keys: random key of each sample of each prompt.
    slots: rows of the cache. It is a multiple of the row shards of the mesh, and each
      shard has at least as many rows as a prompt has samples.

  Returns:
    The responses, in the order of the prompts.

  Raises:
    ValueError: the row shards do not divide `slots` and prompts as required.
  """
  shards, start = axis_size(BATCH_AXES), prompts.tokens.shape[1]
  queue = _make_queue(prompts, keys, shards, slots)

  def prefill(step, taken) -> DecodeRows:
    """Returns new rows for the next prompts of each shard."""
    batch, batch_keys, owners = _take_next_prompts(queue, taken)
    rows = begin_rows(sampler, batch, batch_keys, step, cache_len=start)
    return rows._replace(owner=owners.reshape(-1))

  def body(state: _LoopState) -> _LoopState:
    state = _refill_rows(queue, state, prefill(state.step - 1, state.taken))
    continue_fn = lambda step, rows: ~_is_prefill_due(queue, rows, state.taken)
    step, rows = advance_rows(sampler, state.rows, state.step, continue_fn)
    return state._replace(step=step, rows=rows)

  none = jnp.zeros(shards, jnp.int32)
  like = jax.eval_shape(prefill, jnp.int32(0), none)
  rows = _make_idle_rows(like, keys, slots, start + sampler.settings.max_new)
  shape = (shards, keys.size // shards)
  zeros = lambda x: jnp.zeros((*shape, *x.shape[1:]), x.dtype)
  stored = jax.tree.map(zeros, rows.responses)
  stored = stored._replace(tokens=stored.tokens + sampler.settings.pad)
  state = jax.lax.while_loop(
    lambda state: jnp.any(state.taken < queue.total) | ~jnp.all(state.rows.done),
    body,
    _LoopState(jnp.int32(1), none, *_shard_rows((rows, stored))),
  )
  return unroll_rings(_merge_shards(_store_responses(state)))


def _make_queue(
  prompts: Batch, keys: Key[Array, "batch samples"], shards: int, slots: int
) -> _PromptQueue:
  count, samples = keys.shape
  places = slots // shards // samples
  if slots % shards or count % shards or not places:
    raise ValueError(
      f"slots={slots} for {count} prompts of {samples} samples: slots and prompts must "
      f"be multiples of the mesh's {shards} row shards, and each shard requires at "
      f"least {samples} slots"
    )
  waiting, keys = _split_shards((prompts, keys), shards)
  has_prompt = jnp.any(waiting.mask, axis=2)
  order = jnp.argsort(~has_prompt, axis=1)
  lanes = min(max(places // _REFILL_PARTS, 1), count // shards)
  return _PromptQueue(waiting, keys, order, jnp.sum(has_prompt, axis=1), lanes)


def _take_next_prompts(
  queue: _PromptQueue, taken: Int[Array, " shards"]
) -> tuple[Batch, Key[Array, "batch samples"], Int[Array, "batch samples"]]:
  """Returns the next prompts of each shard, their keys and their responses' numbers."""
  last, samples = queue.order.shape[1] - 1, queue.keys.shape[2]
  place = jnp.minimum(taken[:, None] + jnp.arange(queue.lanes), last)
  index = jnp.take_along_axis(queue.order, place, axis=1)
  prompts, keys = _merge_shards(_take((queue.prompts, queue.keys), index))
  return prompts, keys, _merge_shards(index)[:, None] * samples + jnp.arange(samples)


def _count_room(
  queue: _PromptQueue, rows: DecodeRows, taken: Int[Array, " shards"]
) -> tuple[Int[Array, " shards"], Int[Array, " shards"]]:
  """Returns how many prompts each shard has free rows for, and how many it requires."""
  required = jnp.minimum(queue.lanes, queue.total - taken)
  free = jnp.sum(_split_shards(rows.done, len(taken)), axis=1)
  return jnp.minimum(free // queue.keys.shape[2], required), required


def _is_prefill_due(
  queue: _PromptQueue, rows: DecodeRows, taken: Int[Array, " shards"]
) -> Bool[Array, ""]:
  """Returns whether at least half of the shards with prompts have enough free rows."""
  free, required = _count_room(queue, rows, taken)
  ready, waits = jnp.sum((free == required) & (required > 0)), jnp.sum(required > 0)
  return (waits > 0) & (2 * ready >= waits)


def _refill_rows(queue: _PromptQueue, state: _LoopState, new: DecodeRows) -> _LoopState:
  """Replaces rows that are done by new ones, and stores the old responses."""
  count, _ = _count_room(queue, state.rows, state.taken)
  rows, new = (_split_shards(each, len(count)) for each in (state.rows, new))
  source = jnp.cumsum(rows.done, axis=1) - 1
  where = rows.done & (source < count[:, None] * queue.keys.shape[2])
  rows = _shard_rows(_merge_shards(jax.vmap(_replace_rows)(rows, new, source, where)))
  stored = _store_responses(state)
  return state._replace(taken=state.taken + count, rows=rows, stored=stored)


def _store_responses(state: _LoopState) -> ResponseRing:
  """Copies the responses of the rows, partial ones too, to those of all prompts."""
  shards, places = state.stored.first_step.shape
  owner, current = _split_shards((state.rows.owner, state.rows.responses), shards)
  # A gather, because libtpu 0.0.42 fails to compile the equivalent scatter.
  has = owner[:, None] == jnp.arange(places)[:, None]
  source, taken = jnp.argmax(has, axis=2), jnp.any(has, axis=2)
  return _shard_rows(jax.vmap(_replace_rows)(state.stored, current, source, taken))


def _make_idle_rows(
  like: DecodeRows, keys: Key[Array, "batch samples"], slots: int, cache_len: int
) -> DecodeRows:
  """Returns rows without responses, with the shapes of new rows and longer caches."""
  empty = lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype)
  widen = lambda x: jnp.zeros((slots, x.shape[1], cache_len, x.shape[3]), x.dtype)
  # jnp.zeros does not support key types, so the keys are set below.
  rest = like._replace(keys=like.owner, caches=())
  return jax.tree.map(empty, rest)._replace(
    owner=jnp.full(slots, keys.size),  # The number of no response.
    keys=jnp.broadcast_to(keys[0, 0], slots),
    done=jnp.ones(slots, bool),
    caches=jax.tree.map(widen, like.caches),
  )


def _replace_rows(
  old: PyTree, new: PyTree, source: Int[Array, " rows"], taken: Bool[Array, " rows"]
) -> PyTree:
  """Replaces some rows of arrays.

  Args:
    old: the arrays.
    new: arrays with new rows; their caches contain only prompts.
    source: number of the new row for each old row.
    taken: whether an old row is replaced.
  """

  def choose(old, new):
    where = taken.reshape(-1, *[1] * (old.ndim - 1))
    if new.shape[1:] == old.shape[1:]:
      return jnp.where(where, new[source], old)
    # Slots after the prompt are masked, so they need no reset.
    prompts = old[:, :, : new.shape[2]]
    prompts = jnp.where(where, new[source], prompts)
    return old.at[:, :, : new.shape[2]].set(prompts)

  return jax.tree.map(choose, old, new)


def _split_shards(tree: PyTree, shards: int) -> PyTree:
  return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def _merge_shards(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


@jax.vmap
def _take(tree: PyTree, index: Int[Array, " some"]) -> PyTree:
  return jax.tree.map(lambda x: x[index], tree)


def _shard_rows(tree: PyTree) -> PyTree:
  """Shards rows over the mesh; without it the compiler may place them elsewhere."""
  return jax.tree.map(lambda x: constrain(x, BATCH_AXES), tree)
