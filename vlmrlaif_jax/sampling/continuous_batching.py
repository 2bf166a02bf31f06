"""Many prompts through few rows: one that is done makes room for one that waits."""

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

_PARTS = 4  # Prompts are read when there is room for one in so many places.


class _Queue(NamedTuple):
  """Prompts that wait, with an axis of shards in front. Each shard of rows has its own,
  so that only counts go from device to device.
  """

  prompts: Batch
  keys: Key[Array, "shards prompts samples"]
  order: Int[Array, "shards prompts"]  # Those that ask, then the others.
  total: Int[Array, " shards"]  # How many ask.
  lanes: int  # How many of each shard are read at once.


class _State(NamedTuple):
  """Where it stands."""

  step: Int[Array, ""]  # The next.
  taken: Int[Array, " shards"]  # How many prompts of each have begun.
  rows: DecodeRows
  found: ResponseRing  # With an axis of shards in front.


def generate_continuously(
  sampler: Sampler, prompts: Batch, keys: Key[Array, "batch samples"], slots: int
) -> ResponseRing:
  """Responses to each prompt, in its order, from `slots` rows at once.

  One program on the device, of one shape: no host decides, so none is waited for.

  Args:
    prompts: with features for videos.
    keys: of each sample of each prompt.
    slots: rows of the cache; divided by the row shards of the mesh that it is traced
      under, with room in each for the samples of a prompt.
  """
  shards, start = axis_size(BATCH_AXES), prompts.tokens.shape[1]
  queue = _queue(prompts, keys, shards, slots)

  def read(step, taken) -> DecodeRows:
    """New rows for the next prompts of each shard."""
    some, their_keys, owners = _next(queue, taken)
    rows = begin_rows(sampler, some, their_keys, step, slots=start)
    return rows._replace(owner=owners.reshape(-1))

  def body(now: _State) -> _State:
    now = _filled(queue, now, read(now.step - 1, now.taken))
    goes_on = lambda step, rows: ~_full(queue, rows, now.taken)
    step, rows = advance_rows(sampler, now.rows, now.step, goes_on)
    return now._replace(step=step, rows=rows)

  none = jnp.zeros(shards, jnp.int32)
  like = jax.eval_shape(read, jnp.int32(0), none)
  rows = _idle(like, keys, slots, start + sampler.settings.max_new)
  shape = (shards, keys.size // shards)
  found = jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[1:]), x.dtype), rows.said)
  found = found._replace(tokens=found.tokens + sampler.settings.pad)
  state = jax.lax.while_loop(
    lambda now: jnp.any(now.taken < queue.total) | ~jnp.all(now.rows.done),
    body,
    _State(jnp.int32(1), none, *_spread((rows, found))),
  )
  return unroll_rings(_flat(_kept(state)))


def _queue(
  prompts: Batch, keys: Key[Array, "batch samples"], shards: int, slots: int
) -> _Queue:
  count, samples = keys.shape
  places = slots // shards // samples
  if slots % shards or count % shards or not places:
    raise ValueError(
      f"slots={slots} for {count} prompts of {samples} samples: {shards} row shards of "
      "the mesh have to divide slots and prompts, and leave each shard as many slots "
      "as there are samples"
    )
  waiting, keys = _split((prompts, keys), shards)
  asked = jnp.any(waiting.mask, axis=2)
  order = jnp.argsort(~asked, axis=1)
  lanes = min(max(places // _PARTS, 1), count // shards)
  return _Queue(waiting, keys, order, jnp.sum(asked, axis=1), lanes)


def _next(
  queue: _Queue, taken: Int[Array, " shards"]
) -> tuple[Batch, Key[Array, "batch samples"], Int[Array, "batch samples"]]:
  """(the next prompts of each shard, their keys, their responses' numbers in it)."""
  last, samples = queue.order.shape[1] - 1, queue.keys.shape[2]
  place = jnp.minimum(taken[:, None] + jnp.arange(queue.lanes), last)
  index = jnp.take_along_axis(queue.order, place, axis=1)
  prompts, keys = _flat(_take((queue.prompts, queue.keys), index))
  return prompts, keys, _flat(index)[:, None] * samples + jnp.arange(samples)


def _room(
  queue: _Queue, rows: DecodeRows, taken: Int[Array, " shards"]
) -> tuple[Int[Array, " shards"], Int[Array, " shards"]]:
  """(how many prompts each shard has room for now; how many it would read)."""
  wanted = jnp.minimum(queue.lanes, queue.total - taken)
  free = jnp.sum(_split(rows.done, len(taken)), axis=1)
  return jnp.minimum(free // queue.keys.shape[2], wanted), wanted


def _full(
  queue: _Queue, rows: DecodeRows, taken: Int[Array, " shards"]
) -> Bool[Array, ""]:
  """Whether most shards where prompts wait have room for all that they would read."""
  found, wanted = _room(queue, rows, taken)
  ready, waits = jnp.sum((found == wanted) & (wanted > 0)), jnp.sum(wanted > 0)
  return (waits > 0) & (2 * ready >= waits)


def _filled(queue: _Queue, now: _State, new: DecodeRows) -> _State:
  """With as many new rows as there is room for; what theirs held is kept."""
  begun, _ = _room(queue, now.rows, now.taken)
  rows, new = (_split(each, len(begun)) for each in (now.rows, new))
  source = jnp.cumsum(rows.done, axis=1) - 1
  where = rows.done & (source < begun[:, None] * queue.keys.shape[2])
  rows = _spread(_flat(jax.vmap(_replaced)(rows, new, source, where)))
  return now._replace(taken=now.taken + begun, rows=rows, found=_kept(now))


def _kept(now: _State) -> ResponseRing:
  """What was found, with what the rows hold now; again, if they are not done."""
  shards, places = now.found.begun.shape
  owner, held = _split((now.rows.owner, now.rows.said), shards)
  # A gather: libtpu 0.0.42 fails to compile the scatter that this might be.
  has = owner[:, None] == jnp.arange(places)[:, None]
  source, taken = jnp.argmax(has, axis=2), jnp.any(has, axis=2)
  return _spread(jax.vmap(_replaced)(now.found, held, source, taken))


def _idle(
  like: DecodeRows, keys: Key[Array, "batch samples"], slots: int, room: int
) -> DecodeRows:
  """Rows that nobody has taken, with shapes as those of new ones."""
  empty = lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype)
  widen = lambda x: jnp.zeros((slots, x.shape[1], room, x.shape[3]), x.dtype)
  # There are no zeros of a key type; the keys are replaced below.
  rest = like._replace(keys=like.owner, caches=())
  return jax.tree.map(empty, rest)._replace(
    owner=jnp.full(slots, keys.size),  # Nobody's.
    keys=jnp.broadcast_to(keys[0, 0], slots),
    done=jnp.ones(slots, bool),
    caches=jax.tree.map(widen, like.caches),
  )


def _replaced(
  old: PyTree, new: PyTree, source: Int[Array, " rows"], taken: Bool[Array, " rows"]
) -> PyTree:
  """Arrays with other rows in the place of some of theirs.

  Args:
    old: the arrays.
    new: where the other rows are from; of caches they hold no more than prompts.
    source: which row of the new ones each would become.
    taken: whether it does.
  """

  def choose(old, new):
    where = taken.reshape(-1, *[1] * (old.ndim - 1))
    if new.shape[1:] == old.shape[1:]:
      return jnp.where(where, new[source], old)
    # What stands behind a prompt is masked, whoever it is of.
    prompts = old[:, :, : new.shape[2]]
    prompts = jnp.where(where, new[source], prompts)
    return old.at[:, :, : new.shape[2]].set(prompts)

  return jax.tree.map(choose, old, new)


def _split(tree: PyTree, shards: int) -> PyTree:
  return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def _flat(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


@jax.vmap
def _take(tree: PyTree, index: Int[Array, " some"]) -> PyTree:
  return jax.tree.map(lambda x: x[index], tree)


def _spread(tree: PyTree) -> PyTree:
  """The rows where the mesh wants them; left to a compiler, they may be anywhere."""
  return jax.tree.map(lambda x: constrain(x, BATCH_AXES), tree)
