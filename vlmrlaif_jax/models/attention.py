"""Attention by one function: plain, or by a kernel that never holds all weights."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from vlmrlaif_jax.models.spread import HEADS, ROWS, TIME, ways

_MASKED = -1e30  # Finite: a row that sees nothing gets a mean, not NaN.
_LANES = 128  # Splash wants lengths of which this is a divisor.
_BLOCK = 512  # Splash's longest block, in tokens.


def causal_mask(mask: Bool[Array, "batch time"]) -> Bool[Array, "batch time time"]:
  """Each token sees itself and what stands before it, of the real tokens."""
  time = mask.shape[1]
  return jnp.tri(time, dtype=bool) & mask[:, None, :]


def attend(
  q: Float[Array, "batch time heads head_dim"],
  k: Float[Array, "batch kv_heads slots head_dim"],
  v: Float[Array, "batch kv_heads slots head_dim"],
  mask: Bool[Array, "#batch time slots"] | Bool[Array, "batch time"] | None,
  *,
  backend: str = "xla",
) -> Float[Array, "batch time heads head_dim"]:
  """softmax(q k' / sqrt(head_dim)) v over what mask lets through.

  Each key and value head serves heads / kv_heads neighbouring query heads (Ainslie
  et al. 2023, 2305.13245). The softmax is in float32.

  Args:
    mask: which slots each token sees; or which tokens are real, as causal_mask takes
      it, and the only kind that "cudnn" and "splash" take. What they return for
      tokens that are not real is finite, and another than that of "xla".
    backend: "xla", the reference; "cudnn", for GPUs and 16-bit types, and rows that no
      "context" divides; "splash", for TPUs, on more than one of which it is to be
      traced under jax.set_mesh, with axes as those of sharding.AXES, of which "tensor"
      divides the kv_heads, and "context" the length.
  """
  if backend not in _BACKENDS:
    raise ValueError(f"attention must be one of {sorted(_BACKENDS)}, not {backend!r}")
  if backend != "xla" and (mask is None or mask.ndim != 2):
    raise ValueError(
      f"{backend} attention is causal, and takes a mask of the real tokens, not one of "
      f'shape {None if mask is None else mask.shape}: let it be "xla" in this model'
    )
  return _BACKENDS[backend](q, k, v, mask)


def _xla(q, k, v, mask):
  if mask is not None and mask.ndim == 2:
    mask = causal_mask(mask)
  batch, time, heads, head_dim = q.shape
  q = q.reshape(batch, time, k.shape[1], heads // k.shape[1], head_dim)
  logits = jnp.einsum("btgrd,bgsd->bgrts", q, k, preferred_element_type=jnp.float32)
  logits *= head_dim**-0.5
  if mask is not None:
    logits = jnp.where(mask[:, None, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  out = jnp.einsum("bgrts,bgsd->btgrd", weights, v)
  return out.reshape(batch, time, heads, head_dim)


def _cudnn(q, k, v, mask):
  """Flash attention of cuDNN, which knows of padding at the end of rows alone.

  So the real tokens are brought to the front, in their order, and back afterwards. A
  mask of all pairs would do as well, but cuDNN would read it, and write a gradient
  for it, time x time numbers a row.
  """
  if ways(TIME) > 1:
    raise ValueError(
      f"cudnn attention cannot work on a part of a row, of context={ways(TIME)}: let "
      'mesh.context be 1, or take "xla"'
    )
  time = q.shape[1]
  even = [(0, 0), (0, time % 2)]  # Odd lengths have no backward pass.
  order = jnp.argsort(~jnp.pad(mask, even), axis=1, stable=True)
  lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
  real = mask[..., None, None]

  def take(x, order):
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")

  def front(x):
    # Nothing is said of a gradient beyond the lengths: where() makes it 0.
    x = jnp.pad(jnp.where(real, x, 0), [*even, (0, 0), (0, 0)])
    return jax.vmap(take)(x, order)

  out = jax.nn.dot_product_attention(
    front(q),
    front(k.swapaxes(1, 2)),
    front(v.swapaxes(1, 2)),
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )
  return jnp.where(real, jax.vmap(take)(out, jnp.argsort(order, axis=1))[:, :time], 0)


def _splash(q, k, v, mask):
  """The TPU kernel; each device of the mesh has its own rows, heads and queries."""
  if k.shape[1] % ways(HEADS):
    raise ValueError(
      f"splash attention cannot give {k.shape[1]} key and value heads to tensor="
      f'{ways(HEADS)} devices: let that divide them, or take "xla"'
    )
  parts = ways(TIME)
  kernel = _splash_kernel(q.shape[2] // ways(HEADS), q.shape[1] // parts, parts)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _splash_alone(kernel, q, k, v, mask, mask)
  of_q, of_kv = P(ROWS, TIME, HEADS), P(ROWS, HEADS)
  of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, TIME)))
  return jax.shard_map(
    _splash_alone,
    in_specs=(of_kernel, of_q, of_kv, of_kv, P(ROWS, TIME), P(ROWS)),
    out_specs=of_q,
    check_vma=False,
  )(kernel, q, k, v, mask, mask)


def _splash_kernel(heads, time, parts):
  """Of so many heads, and rows in so many parts of this length, which are padded."""
  block, padded = splash_blocks(time)
  whole = splash_attention.CausalMask((parts * padded, parts * padded))
  return splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([whole] * heads),
    head_shards=1,
    q_seq_shards=parts,
    block_sizes=splash_attention.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
  )


def _splash_alone(kernel, q, k, v, mask, seen):
  """Splash attention on one device: real tokens see the real ones up to themselves.

  Padding is a segment of its own; each of its tokens sees at least itself.

  Args:
    q: of a part of each row.
    mask: of that part.
    seen: of the whole rows, as k and v are.
  """
  time, head_dim = q.shape[1], q.shape[3]
  _, padded = splash_blocks(time)

  def widen(x, axis):
    """Every part of a row padded, on whichever device it is."""
    parts = x.reshape(*x.shape[:axis], -1, time, *x.shape[axis + 1 :])
    empty = [(0, padded - time if i == axis + 1 else 0) for i in range(parts.ndim)]
    return jnp.pad(parts, empty).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

  def row(q, k, v, *segments):
    return kernel(q, k, v, segment_ids=splash_attention.SegmentIds(*segments))

  q = (q * head_dim**-0.5).swapaxes(1, 2)
  segments = [widen(x, 1).astype(jnp.int32) for x in (mask, seen)]
  out = jax.vmap(row)(*(widen(x, 2) for x in (q, k, v)), *segments)
  return out[:, :, :time].swapaxes(1, 2)


def splash_blocks(time: int) -> tuple[int, int]:
  """The length of a block, and the multiple of it that rows are padded to.

  The fewest blocks of at most 512 tokens, and no longer than it takes: 600 tokens
  are 2 blocks of 384.
  """
  count = -(-time // _BLOCK)
  block = -(-time // (count * _LANES)) * _LANES
  return block, count * block


_BACKENDS = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
