"""Exact attention in plain XLA that stores chunk x chunk weights at a time.

FlashAttention-2 (Dao 2023, 2307.08691), algorithms 1 and 2: a chunk of queries attends
to the chunks of keys up to its own, with a running maximum and sum. The backward pass
recomputes the weights from the logarithm of that sum.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30
_CHUNK = 64  # Maximum tokens of a chunk, whose weights fit in a CPU's cache.


def attend_chunked(
  q: Float[Array, "batch time heads head_dim"],
  k: Float[Array, "batch kv_heads time head_dim"],
  v: Float[Array, "batch kv_heads time head_dim"],
  segments: Bool[Array, "batch time"] | Int[Array, "batch time"],
) -> Float[Array, "batch time heads head_dim"]:
  """Computes attention of each token to its segment up to itself.

  Outputs of padding, which is segment 0 or False, are finite and have no meaning.
  """
  batch, time, heads, head_dim = q.shape
  count = -(-time // _CHUNK)
  size = -(-time // count)  # The fewest chunks, as short as possible.
  extra = -time % size

  def fold(x):
    """Reshapes [batch heads time dim] to [chunks batch kv_heads groups size dim]."""
    x = jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)])
    x = x.reshape(batch, k.shape[1], -1, (time + extra) // size, size, head_dim)
    return jnp.moveaxis(x, 3, 0)

  segments = jnp.pad(segments.astype(jnp.int32), [(0, 0), (0, extra)])
  segments = segments.reshape(batch, -1, size).swapaxes(0, 1)
  fold_kv = lambda x: fold(x)[:, :, :, 0]
  scaled = (q * head_dim**-0.5).swapaxes(1, 2)
  out = _attend(fold(scaled), fold_kv(k), fold_kv(v), segments)
  out = jnp.moveaxis(out, 0, 3).reshape(batch, heads, -1, head_dim)
  return out[:, :, :time].swapaxes(1, 2)


def _find_first_visible(
  segments: Int[Array, "chunks batch size"],
) -> Int[Array, " chunks"]:
  """Returns the first chunk that any query of each chunk attends to, or its own."""
  chunks = jnp.arange(len(segments))
  limit = jnp.iinfo(segments.dtype).max
  low = jnp.min(jnp.where(segments > 0, segments, limit), axis=2)
  high = jnp.max(segments, axis=2)
  # Segments increase, so only these chunks can share one.
  may_share = jnp.any(high >= low[:, None], axis=2)
  return jnp.min(jnp.where(may_share, chunks, chunks[:, None]), axis=1)


def _einsum(subscripts, *xs):
  return jnp.einsum(subscripts, *xs, preferred_element_type=jnp.float32)


def _compute_logits(q, k, segments, i, j):
  """Computes float32 logits of the queries of chunk i and the keys of chunk j."""
  logits = _einsum("bgrtd,bgsd->bgrts", q, k)
  at = jnp.arange(q.shape[-2])
  causal = (i - j) * len(at) + at[:, None] >= at
  visible = causal & (segments[i][:, :, None] == segments[j][:, None])
  return jnp.where(visible[:, None, None], logits, _MASKED)


def _forward(q, k, v, segments):
  """Returns outputs, and the log-sum-exp of the logits of each query."""
  first = _find_first_visible(segments)

  def attend_chunk(i):
    def add(j, carry):
      out, top, total = carry
      logits = _compute_logits(q[i], k[j], segments, i, j)
      higher = jnp.maximum(top, jnp.max(logits, axis=-1))
      weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
      added = _einsum("bgrts,bgsd->bgrtd", weights.astype(v.dtype), v[j])
      out = out * shrink[..., None] + added
      return out, higher, total * shrink + jnp.sum(weights, axis=-1)

    zeros = jnp.zeros(q.shape[1:], jnp.float32)
    start = zeros, zeros[..., 0] + _MASKED, zeros[..., 0]
    out, top, total = jax.lax.fori_loop(first[i], i + 1, add, start)
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

  return jax.lax.map(attend_chunk, jnp.arange(len(q)))


@jax.custom_vjp
def _attend(q, k, v, segments):
  return _forward(q, k, v, segments)[0]


def _attend_with_residuals(q, k, v, segments):
  out, lse = _forward(q, k, v, segments)
  return out, (q, k, v, segments, out, lse)


def _backward(residuals, slope):
  """Computes the gradients of queries, keys and values, with sums in float32."""
  q, k, v, segments, out, lse = residuals
  first = _find_first_visible(segments)
  # Term of the softmax gradient that is the same for all keys of a query.
  shared = jnp.sum(out.astype(jnp.float32) * slope, axis=-1)

  def backward_chunk(by_kv, i):
    def add(j, carry):
      by_q, by_k, by_v = carry
      weights = jnp.exp(_compute_logits(q[i], k[j], segments, i, j) - lse[i][..., None])
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
  (by_k, by_v), by_q = jax.lax.scan(backward_chunk, (zeros, zeros), jnp.arange(len(q)))
  return by_q.astype(q.dtype), by_k.astype(k.dtype), by_v.astype(v.dtype), None


_attend.defvjp(_attend_with_residuals, _backward)
