"""Attention by one function: plain, or by a kernel that never holds all weights."""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.core.types import AnyArray
from vlmrlaif_jax.models.ops.activation_sharding import (
  BATCH_AXES,
  HEADS_AXIS,
  TIME_AXIS,
  axis_size,
)
from vlmrlaif_jax.models.ops.chunked_attention import attend_chunked

_MASKED = -1e30  # Finite: a row that sees nothing gets a mean, not NaN.
_LANES = 128  # Splash wants lengths of which this is a divisor.
_BLOCK = 512  # Splash's longest block, in tokens.


class SharedPromptMask(NamedTuple):
  """Which tokens are real, in rows of a prompt and then a group of responses to it.

  A response sees the prompt and itself, up to each token, and no other response.
  """

  prompt: Bool[AnyArray, "batch start"]
  responses: Bool[AnyArray, "batch group time"]


# Which slots each token sees; or which tokens are real; or the segment of each token.
Mask: TypeAlias = (
  Bool[Array, "#batch time slots"]
  | Bool[Array, "batch time"]
  | Int[Array, "batch time"]
  | SharedPromptMask
)


def causal_mask(mask: Bool[Array, "*batch time"]) -> Bool[Array, "*batch time time"]:
  """Each token sees itself and what stands before it, of the real tokens."""
  return jnp.tri(mask.shape[-1], dtype=bool) & mask[..., None, :]


def segment_mask(segments: Int[Array, "batch time"]) -> Bool[Array, "batch time time"]:
  """Each token sees itself and what stands before it, of its own segment."""
  own = segments[:, :, None] == segments[:, None, :]
  return jnp.tri(segments.shape[1], dtype=bool) & own


def attend(
  q: Float[Array, "batch time heads head_dim"],
  k: Float[Array, "batch kv_heads slots head_dim"],
  v: Float[Array, "batch kv_heads slots head_dim"],
  mask: Mask | None,
  *,
  backend: str = "xla",
) -> Float[Array, "batch time heads head_dim"]:
  """softmax(q k' / sqrt(head_dim)) v over what mask lets through.

  Each key and value head serves heads / kv_heads neighbouring query heads (Ainslie
  et al. 2023, 2305.13245). The softmax is in float32.

  Args:
    mask: which slots each token sees; or which tokens are real, as causal_mask takes
      it; or the segment that each token is of, from 1 on, and 0 for padding, as
      segment_mask takes it; or Shared. All but "xla" take none but the last three, and
      "cudnn" no segments. What they return for tokens that are not real is finite, and
      another than that of "xla".
    backend: "xla", the reference; "chunked", for CPUs, and any device without a kernel;
      "cudnn", for GPUs and 16-bit types, and rows that no "context" divides; "splash",
      for TPUs, on more than one of which it is to be traced under jax.set_mesh, with
      axes as those of sharding.AXES, of which "tensor" divides the kv_heads, and
      "context" the length, Shared apart.
  """
  if backend not in BACKENDS:
    raise ValueError(f"attention must be one of {sorted(BACKENDS)}, not {backend!r}")
  if isinstance(mask, SharedPromptMask):
    # The kernels never hold all weights, and what they compute again is little beside
    # the rest of a layer, which sees every prompt once.
    shared = _shared_in_rows if backend in ("cudnn", "splash") else _shared
    return shared(BACKENDS[backend], q, k, v, mask)
  if backend != "xla" and (mask is None or mask.ndim != 2):
    raise ValueError(
      f"{backend} attention is causal, and takes a mask of the real tokens, not one of "
      f'shape {None if mask is None else mask.shape}: let it be "xla" in this model'
    )
  return BACKENDS[backend](q, k, v, mask)


def _xla(q, k, v, mask):
  if mask is not None and mask.ndim == 2:
    mask = causal_mask(mask) if mask.dtype == bool else segment_mask(mask)
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
  if mask.dtype != bool:
    raise ValueError(
      "cudnn attention knows nothing of segments: give each example a row of its own, "
      'or take "chunked" in this model'
    )
  if axis_size(TIME_AXIS) > 1:
    raise ValueError(
      f"cudnn attention cannot work on a part of a row, of context={axis_size(TIME_AXIS)}: let "
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
  if k.shape[1] % axis_size(HEADS_AXIS):
    raise ValueError(
      f"splash attention cannot give {k.shape[1]} key and value heads to tensor="
      f'{axis_size(HEADS_AXIS)} devices: let that divide them, or take "xla"'
    )
  parts = axis_size(TIME_AXIS)
  kernel = _splash_kernel(
    q.shape[2] // axis_size(HEADS_AXIS), q.shape[1] // parts, parts
  )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _splash_alone(kernel, q, k, v, mask, mask)
  of_q, of_kv = P(BATCH_AXES, TIME_AXIS, HEADS_AXIS), P(BATCH_AXES, HEADS_AXIS)
  of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, TIME_AXIS)))
  return jax.shard_map(
    _splash_alone,
    in_specs=(of_kernel, of_q, of_kv, of_kv, P(BATCH_AXES, TIME_AXIS), P(BATCH_AXES)),
    out_specs=of_q,
    check_vma=False,
  )(kernel, q, k, v, mask, mask)


def _splash_kernel(heads, time, parts):
  """Of so many heads, and rows in so many parts of this length, which are padded."""
  block, padded = splash_blocks(time)
  whole = splash_attention.CausalMask((parts * padded, parts * padded))
  passes = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
  blocks = {f"block_{name}": block for name in passes}
  return splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([whole] * heads),
    head_shards=1,
    q_seq_shards=parts,
    block_sizes=splash_attention.BlockSizes(**blocks),
  )


def _splash_alone(kernel, q, k, v, mask, seen):
  """Splash attention on one device: tokens see those of their segment up to themselves.

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


def _shared(of_prompts, q, k, v, mask):
  """Prompts among themselves, by a backend; then responses, over one copy of theirs."""
  batch, group, time = mask.responses.shape
  start, kv_heads, head_dim = mask.prompt.shape[1], k.shape[1], k.shape[3]
  prompt_k, prompt_v = k[:, :, :start], v[:, :, :start]
  prompts = of_prompts(q[:, :start], prompt_k, prompt_v, mask.prompt)
  own = lambda x: x[:, :, start:].reshape(batch, kv_heads, group, time, head_dim)
  q = q[:, start:].reshape(batch, group, time, kv_heads, -1, head_dim)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits = [
    product("bntgrd,bgsd->bgnrts", q, prompt_k),
    product("bntgrd,bgnsd->bgnrts", q, own(k)),
  ]
  logits = jnp.concatenate(logits, axis=-1) * head_dim**-0.5
  before = jnp.broadcast_to(mask.prompt[:, None, None], (batch, group, time, start))
  seen = jnp.concatenate([before, causal_mask(mask.responses)], axis=-1)
  logits = jnp.where(seen[:, None, :, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  out = jnp.einsum("bgnrts,bgsd->bntgrd", weights[..., :start], prompt_v)
  out += jnp.einsum("bgnrts,bgnsd->bntgrd", weights[..., start:], own(v))
  return jnp.concatenate([prompts, out.reshape(batch, group * time, -1, head_dim)], 1)


def _shared_in_rows(kernel, q, k, v, mask):
  """By a kernel that knows of rows alone: here each response has its prompt's copy."""
  batch, group, time = mask.responses.shape
  start = mask.prompt.shape[1]
  more = -(start + time) % axis_size(
    TIME_AXIS
  )  # Others at the end, which none of these sees.

  def rows(prompt, responses):
    copies = jnp.broadcast_to(prompt[:, None], (batch, group, *prompt.shape[1:]))
    both = jnp.concatenate([copies, responses], axis=2)
    both = both.reshape(batch * group, start + time, *prompt.shape[2:])
    return jnp.pad(both, [(0, 0), (0, more)] + [(0, 0)] * (both.ndim - 2))

  def split(x):
    responses = x[:, start:].reshape(batch, group, time, *x.shape[2:])
    return rows(x[:, :start], responses)

  keys = lambda x: split(x.swapaxes(1, 2)).swapaxes(1, 2)
  out = kernel(split(q), keys(k), keys(v), rows(*mask))
  out = out[:, : start + time].reshape(batch, group, start + time, *out.shape[2:])
  responses = out[:, :, start:].reshape(batch, group * time, *out.shape[3:])
  return jnp.concatenate([out[:, 0, :start], responses], axis=1)


BACKENDS = {"xla": _xla, "chunked": attend_chunked, "cudnn": _cudnn, "splash": _splash}
