"""Attention with several backends: plain XLA, or kernels that never store all weights.

`attend` is the main function; BACKENDS lists the backends.
"""

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

_MASKED = -1e30  # Finite, so that a fully masked row is a mean, not NaN.
_LANES = 128  # Splash requires lengths that are multiples of this.
_BLOCK = 512  # Maximum length of a block of Splash, in tokens.


class SharedPromptMask(NamedTuple):
  """A mask for rows of a prompt and a group of responses; True for real tokens.

  A token of a response attends to the prompt and to earlier tokens of the response, not
  to other responses.
  """

  prompt: Bool[AnyArray, "batch start"]
  responses: Bool[AnyArray, "batch group time"]


# Slots that each token attends to; or real tokens; or the segment of each token.
Mask: TypeAlias = (
  Bool[Array, "#batch time slots"]
  | Bool[Array, "batch time"]
  | Int[Array, "batch time"]
  | SharedPromptMask
)


def causal_mask(mask: Bool[Array, "*batch time"]) -> Bool[Array, "*batch time time"]:
  """Returns the mask by which tokens attend to real tokens up to themselves.

  >>> print(causal_mask(jnp.array([False, True, True])).astype(int))
  [[0 0 0]
   [0 1 0]
   [0 1 1]]
  """
  return jnp.tri(mask.shape[-1], dtype=bool) & mask[..., None, :]


def segment_mask(segments: Int[Array, "batch time"]) -> Bool[Array, "batch time time"]:
  """Returns the mask by which tokens attend to their segment up to themselves."""
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
  """Computes softmax(q k' / sqrt(head_dim)) v: Vaswani et al. 2017 (1706.03762), eq. 1.

  A key and value head serves heads / kv_heads neighboring query heads (Ainslie et al.
  2023, 2305.13245, section 2.2). The softmax is in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: one of four. A mask with three axes: the slots that each token attends to. A
      boolean mask with two axes: the real tokens, as for causal_mask. Integers: the
      segment of each token, as for segment_mask, with 0 for padding. A
      SharedPromptMask. Only "xla" supports the first or None, and "cudnn" does not
      support segments. Outputs of padding are finite and differ between backends.
    backend: a key of BACKENDS. "xla" is the reference. "chunked" is for CPUs and other
      devices without a kernel. "cudnn" is for GPUs, 16-bit dtypes and a "context" axis
      of 1. "splash" is for TPUs. On several TPUs it requires jax.set_mesh with the axes
      sharding.AXES. Then kv_heads must be a multiple of "tensor", and the length a
      multiple of "context" unless the mask is a SharedPromptMask.

  Raises:
    ValueError: the backend is unknown, or does not support the mask or the mesh.
  """
  if backend not in BACKENDS:
    raise ValueError(f"attention must be one of {sorted(BACKENDS)}, not {backend!r}")
  if isinstance(mask, SharedPromptMask):
    # The kernels run copies of the prompt, which costs little next to the rest of a
    # layer, where every prompt is run once.
    shared = _attend_shared_copies if backend in ("cudnn", "splash") else _attend_shared
    return shared(BACKENDS[backend], q, k, v, mask)
  if backend != "xla" and (mask is None or mask.ndim != 2):
    raise ValueError(
      f"{backend} attention requires a mask of real tokens with 2 axes, not one of "
      f'shape {None if mask is None else mask.shape}: use backend="xla"'
    )
  return BACKENDS[backend](q, k, v, mask)


def _attend_xla(q, k, v, mask):
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


def _attend_cudnn(q, k, v, mask):
  """Runs cuDNN's flash attention, which supports padding only at the end of rows.

  So real tokens are moved to the front in their order, and moved back afterward. A mask
  of all pairs would also work, but cuDNN would read time x time numbers per row and
  write their gradient.
  """
  if mask.dtype != bool:
    raise ValueError(
      "cudnn attention does not support packed rows: set pack_len=0 to give each "
      'example a row, or --config.model.attention="chunked"'
    )
  if (parts := axis_size(TIME_AXIS)) > 1:
    raise ValueError(
      f"cudnn attention does not support mesh.context={parts}: set "
      '--config.mesh.context=1 or --config.model.attention="xla"'
    )
  time = q.shape[1]
  even = [(0, 0), (0, time % 2)]  # Odd lengths have no backward pass.
  order = jnp.argsort(~jnp.pad(mask, even), axis=1, stable=True)
  lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
  real = mask[..., None, None]

  def take(x, order):
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")

  def front(x):
    # cuDNN does not define gradients beyond the lengths; where() sets them to 0.
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


def _attend_splash(q, k, v, mask):
  """Runs the TPU kernel, with rows, heads and queries sharded over the mesh."""
  if k.shape[1] % (shards := axis_size(HEADS_AXIS)):
    raise ValueError(
      f"splash attention requires that mesh.tensor={shards} divides the "
      f"{k.shape[1]} key and value heads: change --config.mesh.tensor or set "
      '--config.model.attention="xla"'
    )
  parts = axis_size(TIME_AXIS)
  kernel = _make_splash_kernel(
    q.shape[2] // axis_size(HEADS_AXIS), q.shape[1] // parts, parts
  )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _run_splash_on_device(kernel, q, k, v, mask, mask)
  q_spec, kv_spec = P(BATCH_AXES, TIME_AXIS, HEADS_AXIS), P(BATCH_AXES, HEADS_AXIS)
  kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, TIME_AXIS)))
  mask_specs = P(BATCH_AXES, TIME_AXIS), P(BATCH_AXES)
  return jax.shard_map(
    _run_splash_on_device,
    in_specs=(kernel_spec, q_spec, kv_spec, kv_spec, *mask_specs),
    out_specs=q_spec,
    check_vma=False,
  )(kernel, q, k, v, mask, mask)


def _make_splash_kernel(heads, time, parts):
  """Returns the kernel for rows of `parts` parts with `time` tokens, before padding."""
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


def _run_splash_on_device(kernel, q, k, v, mask, kv_mask):
  """Runs Splash attention on one device, with queries of a part of each row.

  Tokens attend to their segment up to themselves. Padding is a segment, so that every
  token attends to at least itself. `mask` is that of q, and `kv_mask` that of k and v.
  """
  time, head_dim = q.shape[1], q.shape[3]
  _, padded = splash_blocks(time)

  def widen(x, axis):
    """Pads every part of a row."""
    parts = x.reshape(*x.shape[:axis], -1, time, *x.shape[axis + 1 :])
    empty = [(0, padded - time if i == axis + 1 else 0) for i in range(parts.ndim)]
    return jnp.pad(parts, empty).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

  def row(q, k, v, *segments):
    return kernel(q, k, v, segment_ids=splash_attention.SegmentIds(*segments))

  q = (q * head_dim**-0.5).swapaxes(1, 2)
  segments = [widen(x, 1).astype(jnp.int32) for x in (mask, kv_mask)]
  out = jax.vmap(row)(*(widen(x, 2) for x in (q, k, v)), *segments)
  return out[:, :, :time].swapaxes(1, 2)


def splash_blocks(time: int) -> tuple[int, int]:
  """Returns the length of a block, and the padded length of a row.

  A row has the fewest blocks of at most 512 tokens, as short as possible.

  >>> splash_blocks(600)
  (384, 768)
  """
  count = -(-time // _BLOCK)
  block = -(-time // (count * _LANES)) * _LANES
  return block, count * block


def _attend_shared(attend_prompts, q, k, v, mask):
  """Runs prompts with a backend, then responses with one copy of their prompt."""
  batch, group, time = mask.responses.shape
  start, kv_heads, head_dim = mask.prompt.shape[1], k.shape[1], k.shape[3]
  prompt_k, prompt_v = k[:, :, :start], v[:, :, :start]
  prompts = attend_prompts(q[:, :start], prompt_k, prompt_v, mask.prompt)
  own = lambda x: x[:, :, start:].reshape(batch, kv_heads, group, time, head_dim)
  q = q[:, start:].reshape(batch, group, time, kv_heads, -1, head_dim)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits = [
    product("bntgrd,bgsd->bgnrts", q, prompt_k),
    product("bntgrd,bgnsd->bgnrts", q, own(k)),
  ]
  logits = jnp.concatenate(logits, axis=-1) * head_dim**-0.5
  prompt = jnp.broadcast_to(mask.prompt[:, None, None], (batch, group, time, start))
  visible = jnp.concatenate([prompt, causal_mask(mask.responses)], axis=-1)
  logits = jnp.where(visible[:, None, :, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  out = jnp.einsum("bgnrts,bgsd->bntgrd", weights[..., :start], prompt_v)
  out += jnp.einsum("bgnrts,bgnsd->bntgrd", weights[..., start:], own(v))
  return jnp.concatenate([prompts, out.reshape(batch, group * time, -1, head_dim)], 1)


def _attend_shared_copies(kernel, q, k, v, mask):
  """Runs a kernel over rows of a response and a copy of its prompt."""
  batch, group, time = mask.responses.shape
  start = mask.prompt.shape[1]
  # Padding at the end, to a multiple of the context axis.
  more = -(start + time) % axis_size(TIME_AXIS)

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


BACKENDS = {
  "xla": _attend_xla,
  "chunked": attend_chunked,
  "cudnn": _attend_cudnn,
  "splash": _attend_splash,
}
