"""Many prompts through few rows: one that is done makes room for one that waits."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from vlmrlaif_jax.models.spread import ROWS, spread, ways
from vlmrlaif_jax.slots import (
  Responses,
  Rows,
  Settings,
  advance,
  begin,
  put,
  replaced,
  responses,
  unrolled,
)
from vlmrlaif_jax.types import Batch, Params

_PARTS = 4  # Prompts are read when there is room for one in so many places.


class _State(NamedTuple):
  """Where it stands. Each shard of rows has prompts and rows of its own, so that only
  counts go from device to device."""

  step: Int[Array, ""]  # The next.
  taken: Int[Array, " shards"]  # How many prompts of each have begun.
  rows: Rows
  found: Responses  # With an axis of shards in front.


def refill(
  model: nn.Module,
  variables: Params,
  prompts: Batch,
  keys: Key[Array, "batch samples"],
  settings: Settings,
  *,
  slots: int,
) -> Responses:
  """Responses to each prompt, in its order, from `slots` rows at once.

  One program on the device, of one shape: no host decides, so none is waited for.

  Args:
    prompts: with features for videos.
    slots: rows of the cache; divided by the row shards of the mesh that it is traced
      under, with room in each for the samples of a prompt.
  """
  shards = ways(ROWS)
  count, samples = keys.shape
  start, new = prompts.tokens.shape[1], settings.max_new
  places = slots // shards // samples
  if slots % shards or count % shards or not places:
    raise ValueError(
      f"slots={slots} for {count} prompts of {samples} samples: {shards} row shards of "
      "the mesh have to divide slots and prompts, and leave each shard as many slots "
      "as there are samples"
    )
  lanes = min(max(places // _PARTS, 1), count // shards)
  split = lambda tree: jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)
  asked = split(jnp.any(prompts.mask, axis=1))
  order = jnp.argsort(~asked, axis=1)  # Those that ask, then the others.
  waiting, total = split((prompts, keys)), jnp.sum(asked, axis=1)
  layers = model.apply(variables, method="unstacked")

  def read(step, taken) -> Rows:
    """New rows for the next prompts of each shard."""
    place = jnp.minimum(taken[:, None] + jnp.arange(lanes), order.shape[1] - 1)
    index = jnp.take_along_axis(order, place, axis=1)
    prompts, keys = _flat(_take(waiting, index))
    owners = _flat(index)[:, None] * samples + jnp.arange(samples)
    return begin(model, variables, prompts, keys, owners, step, settings, slots=start)

  def room(rows: Rows, taken) -> tuple[Int[Array, " shards"], Int[Array, " shards"]]:
    """(how many prompts each shard has room for now; how many it would read)"""
    wanted = jnp.minimum(lanes, total - taken)
    free = jnp.sum(split(rows.done), axis=1)
    return jnp.minimum(free // samples, wanted), wanted

  def full(rows: Rows, taken) -> Bool[Array, ""]:
    """Whether most shards where prompts wait have room for all that they would read."""
    found, wanted = room(rows, taken)
    ready, waits = jnp.sum((found == wanted) & (wanted > 0)), jnp.sum(wanted > 0)
    return (waits > 0) & (2 * ready >= waits)

  def fill(now: _State) -> _State:
    begun, _ = room(now.rows, now.taken)
    free = split(now.rows.done)
    source = jnp.cumsum(free, axis=1) - 1
    where = free & (source < begun[:, None] * samples)
    fresh = split(read(now.step - 1, now.taken))
    rows = _flat(jax.vmap(put)(split(now.rows), fresh, source, where))
    return now._replace(taken=now.taken + begun, rows=_spread(rows), found=keep(now))

  def keep(now: _State) -> Responses:
    """What was found, with what the rows hold now; again, if they are not done."""
    owner, held = split((now.rows.owner, responses(now.rows)))
    # A gather: libtpu 0.0.42 fails to compile the scatter that this might be.
    has = owner[:, None] == jnp.arange(count // shards * samples)[:, None]
    source, taken = jnp.argmax(has, axis=2), jnp.any(has, axis=2)
    return _spread(jax.vmap(replaced)(now.found, held, source, taken))

  def body(now: _State) -> _State:
    now = fill(now)
    step, rows = jax.lax.while_loop(
      lambda at: ~jnp.all(at[1].done) & ~full(at[1], now.taken),
      lambda at: (
        at[0] + 1,
        advance(model, variables, at[1], at[0], settings, layers),
      ),
      (now.step, now.rows),
    )
    return now._replace(step=step, rows=rows)

  none = jnp.zeros(shards, jnp.int32)
  rows = _idle(jax.eval_shape(read, jnp.int32(0), none), keys, slots, start + new)
  found = jax.tree.map(
    lambda x: jnp.zeros((shards, count // shards * samples, *x.shape[1:]), x.dtype),
    responses(rows),
  )
  found = found._replace(tokens=found.tokens + settings.pad)
  state = jax.lax.while_loop(
    lambda now: jnp.any(now.taken < total) | ~jnp.all(now.rows.done),
    body,
    _State(jnp.int32(1), none, *_spread((rows, found))),
  )
  return unrolled(_flat(keep(state)))


def _idle(like: Rows, keys: Key[Array, "batch samples"], slots: int, room: int) -> Rows:
  """Rows that nobody has taken, with shapes as those of new ones."""
  empty = lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype)
  widen = lambda x: jnp.zeros((slots, x.shape[1], room, x.shape[3]), x.dtype)
  rest = like._replace(keys=(), caches=())
  return jax.tree.map(empty, rest)._replace(
    owner=jnp.full(slots, keys.size),  # Nobody's.
    keys=jnp.broadcast_to(keys[0, 0], slots),
    done=jnp.ones(slots, bool),
    caches=jax.tree.map(widen, like.caches),
  )


def _flat(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


@jax.vmap
def _take(tree: PyTree, index: Int[Array, " some"]) -> PyTree:
  return jax.tree.map(lambda x: x[index], tree)


def _spread(tree: PyTree) -> PyTree:
  """The rows where the mesh wants them; left to a compiler, they may be anywhere."""
  return jax.tree.map(lambda x: spread(x, ROWS), tree)
