"""Attention in chunks, in plain XLA: no more than chunk x chunk weights at once.

FlashAttention-2 (Dao 2023, 2307.08691): queries meet the keys before them chunk by
chunk, with a running maximum and sum; the backward pass makes the weights again, from
the logarithm of that sum. Exact, on any device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30
_CHUNK = 64  # Tokens at most: the weights of a chunk stay in a CPU's cache.


def attend_chunked(
  q: Float[Array, "batch time heads head_dim"],
  k: Float[Array, "batch kv_heads time head_dim"],
  v: Float[Array, "batch kv_heads time head_dim"],
  segments: Bool[Array, "batch time"] | Int[Array, "batch time"],
) -> Float[Array, "batch time heads head_dim"]:
  """Each token sees those of its own segment, up to itself.

  What is said of tokens of segment 0 or False, padding, is finite and means nothing.
  """
  batch, time, heads, head_dim = q.shape
  count = -(-time // _CHUNK)
  size = -(-time // count)  # The fewest chunks, and no longer than need be.
  extra = -time % size

  def fold(x):
    """[batch heads time head_dim] -> [chunks batch kv_heads groups size head_dim]."""
    x = jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)])
    x = x.reshape(batch, k.shape[1], -1, (time + extra) // size, size, head_dim)
    return jnp.moveaxis(x, 3, 0)

  segments = jnp.pad(segments.astype(jnp.int32), [(0, 0), (0, extra)])
  segments = segments.reshape(batch, -1, size).swapaxes(0, 1)
  of_kv = lambda x: fold(x)[:, :, :, 0]
  scaled = (q * head_dim**-0.5).swapaxes(1, 2)
  out = _attend(fold(scaled), of_kv(k), of_kv(v), segments)
  out = jnp.moveaxis(out, 0, 3).reshape(batch, heads, -1, head_dim)
  return out[:, :, :time].swapaxes(1, 2)


def _first_seen(segments: Int[Array, "chunks batch size"]) -> Int[Array, " chunks"]:
  """The first chunk that any query of each chunk sees; at the latest its own."""
  chunks = jnp.arange(len(segments))
  most = jnp.iinfo(segments.dtype).max
  low = jnp.min(jnp.where(segments > 0, segments, most), axis=2)
  high = jnp.max(segments, axis=2)
  may_see = jnp.any(high >= low[:, None], axis=2)  # Equal segments are nowhere else.
  return jnp.min(jnp.where(may_see, chunks, chunks[:, None]), axis=1)


def _einsum(how, *xs):
  return jnp.einsum(how, *xs, preferred_element_type=jnp.float32)


def _logits(q, k, segments, i, j):
  """Of the queries of chunk i and the keys of chunk j, in float32."""
  logits = _einsum("bgrtd,bgsd->bgrts", q, k)
  at = jnp.arange(q.shape[-2])
  before = (i - j) * len(at) + at[:, None] >= at
  seen = before & (segments[i][:, :, None] == segments[j][:, None])
  return jnp.where(seen[:, None, None], logits, _MASKED)


def _forward(q, k, v, segments):
  """(outputs, log-sum-exp of the logits of each query)."""
  first = _first_seen(segments)

  def of_queries(i):
    def add(j, carry):
      out, top, total = carry
      logits = _logits(q[i], k[j], segments, i, j)
      higher = jnp.maximum(top, jnp.max(logits, axis=-1))
      weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
      added = _einsum("bgrts,bgsd->bgrtd", weights.astype(v.dtype), v[j])
      out = out * shrink[..., None] + added
      return out, higher, total * shrink + jnp.sum(weights, axis=-1)

    zeros = jnp.zeros(q.shape[1:], jnp.float32)
    start = zeros, zeros[..., 0] + _MASKED, zeros[..., 0]
    out, top, total = jax.lax.fori_loop(first[i], i + 1, add, start)
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

  return jax.lax.map(of_queries, jnp.arange(len(q)))


@jax.custom_vjp
def _attend(q, k, v, segments):
  return _forward(q, k, v, segments)[0]


def _attend_and_keep(q, k, v, segments):
  out, lse = _forward(q, k, v, segments)
  return out, (q, k, v, segments, out, lse)


def _backward(kept, slope):
  """The gradients by queries, keys and values; sums are in float32."""
  q, k, v, segments, out, lse = kept
  first = _first_seen(segments)
  # What all weights of a query have in common: the softmax's sum is fixed.
  shared = jnp.sum(out.astype(jnp.float32) * slope, axis=-1)

  def of_queries(by_kv, i):
    def add(j, carry):
      by_q, by_k, by_v = carry
      weights = jnp.exp(_logits(q[i], k[j], segments, i, j) - lse[i][..., None])
      by_weights = _einsum("bgrtd,bgsd->bgrts", slope[i], v[j])
      by_logits = (weights * (by_weights - shared[i][..., None])).astype(q.dtype)
      weights = weights.astype(v.dtype)
      by_v = by_v.at[j].add(_einsum("bgrts,bgrtd->bgsd", weights, slope[i]))
      by_k = by_k.at[j].add(_einsum("bgrts,bgrtd->bgsd", by_logits, q[i]))
      by_q += _einsum("bgrts,bgsd->bgrtd", by_logits, k[j])
      return by_q, by_k, by_v

    start = jnp.zeros(q.shape[1:], jnp.float32), *by_kv
    by_q, *by_kv = jax.lax.fori_loop(first[i], i + 1, add, start)
    return tuple(by_kv), by_q

  zeros = jnp.zeros(k.shape, jnp.float32)
  (by_k, by_v), by_q = jax.lax.scan(of_queries, (zeros, zeros), jnp.arange(len(q)))
  return by_q.astype(q.dtype), by_k.astype(k.dtype), by_v.astype(v.dtype), None


_attend.defvjp(_attend_and_keep, _backward)
