"""Converts checkpoint tensors to parameters and back, by a table of names.

`convert_from_hf` reads each tensor slice by slice into the shards of its parameter.
`convert_to_hf` is its inverse.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from vlmrlaif_jax.core.types import AnyArray, Params
from vlmrlaif_jax.huggingface.tensor_files import Tensor, Tensors, allocate_aligned

# Parameter path -> (tensor name, operation). The operation is "T" to transpose, "conv"
# or "conv3d" to flatten, or "". "{}" in a name is the layer; layers are stacked on axis
# 0.
NameTable: TypeAlias = Mapping[str, tuple[str, str]]
Number: TypeAlias = Int[Array, ""] | int
Part: TypeAlias = Tensor | np.ndarray
Shape: TypeAlias = jax.ShapeDtypeStruct

MAX_NAMES = 5  # Names of tensors in a message.
_CHUNK_BYTES = 8 << 20  # Bytes of a tensor that a process transfers per step.
_HOST_PLATFORMS = ("cpu",)  # Platforms whose devices use the memory of the host.
_READERS = 4  # Threads that read the layers of a parameter.


class TensorParts(NamedTuple):
  """The tensors of a parameter."""

  parts: Sequence[Part]  # One tensor, or one per layer.
  op: str  # See NameTable.
  stacked: bool  # Whether the first axis of the parameter is the layer.


class PackedKernel(NamedTuple):
  """The packed form of a stacked parameter, which is packed layer by layer."""

  # Packs one layer; see quantization.SCHEMES.
  pack: Callable[[AnyArray], dict[str, AnyArray]]
  # Sharding of each stacked output of `pack`.
  shardings: Mapping[str, NamedSharding]


# [out, 3, patch, patch] <-> [patch * patch * 3, out]
_flatten_conv = lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
_unflatten_conv = lambda x, side: x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
# [out, 3, 2, patch, patch] <-> [3 * 2 * patch * patch, out]
_flatten_conv3d = lambda x: x.reshape(x.shape[0], -1).T
_unflatten_conv3d = lambda x, side: x.T.reshape(-1, 3, 2, side, side)

# Operation -> function from a tensor to a parameter, and its inverse.
_FROM_HF = {
  "": lambda x: x,
  "T": lambda x: x.T,
  "conv": _flatten_conv,
  "conv3d": _flatten_conv3d,
}
_TO_HF = {
  "": lambda x: x,
  "T": lambda x: x.T,
  "conv": lambda x: _unflatten_conv(x, math.isqrt(x.shape[0] // 3)),
  "conv3d": lambda x: _unflatten_conv3d(x, math.isqrt(x.shape[0] // 6)),
}
# Operation -> function from the spec of a parameter to that of its tensor. Convolutions
# are small, so only their filters are sharded, which are the rows of the tensor.
_HF_SPECS = {
  "": lambda axes: PartitionSpec(*axes),
  "T": lambda axes: PartitionSpec(*axes[::-1]),
  "conv": lambda axes: PartitionSpec(axes[-1]),
  "conv3d": lambda axes: PartitionSpec(axes[-1]),
}

_flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")
_unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")


def convert_from_hf(
  table: NameTable,
  tensors: Tensors,
  shapes: Params,
  shardings: Params | None = None,
  on_bytes_read: Callable[[int], None] = lambda count: None,
  packed: Mapping[str, PackedKernel] = MappingProxyType({}),
) -> Params:
  """Converts the tensors of a checkpoint to parameters.

  All names and shapes are checked before any tensor is read or allocated. Each process
  then reads only the rows that its devices hold, a few rows of one tensor per step. A
  packed layer is packed before the next one is read.

  Args:
    table: Name and operation for each parameter.
    tensors: Tensors of the checkpoint, by name.
    shapes: Shapes and dtypes of the parameters; jax.eval_shape of "params".
    shardings: Sharding of each parameter. None returns NumPy arrays.
    on_bytes_read: Receives the bytes of each parameter's tensors after they are read.
    packed: Parameter path -> packed form. Its outputs replace the last name of the
      path. Ignored if `shardings` is None.

  Returns:
    Parameters in the structure of `shapes`.

  Raises:
    ValueError: A parameter is not in the table, a tensor is missing, unused or of
      another shape, or a sharding splits the layers.
  """
  _check_tensors(tensors, get_hf_shapes(table, shapes))
  flat_shardings = None if shardings is None else _flatten(shardings)
  params: dict[str, AnyArray] = {}
  for path, shape in _flatten(shapes).items():
    name, op = table[path]
    parts = [tensors[n] for n in _list_names(name, shape)]
    source = TensorParts(parts, op, "{}" in name)
    if flat_shardings is None:
      params[path] = _read_slice(source, shape, (slice(None),) * len(shape.shape))
    elif path in packed:
      leaves = _load_packed(source, shape, packed[path], flat_shardings[path])
      module = path.rpartition("/")[0]
      params |= {f"{module}/{leaf}": x for leaf, x in leaves.items()}
    else:
      params[path] = _load_to_mesh(source, shape, flat_shardings[path])
    on_bytes_read(sum(part.nbytes for part in parts))
  return _unflatten(params)


def convert_to_hf(table: NameTable, params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Converts parameters to checkpoint tensors; yields one (name, values) at a time.

  Raises:
    ValueError: A parameter is not in the table.
  """
  _check_known(table, flat := _flatten(params))
  for path, leaf in flat.items():
    name, op = table[path]
    parts = leaf if "{}" in name else [leaf]
    for each, part in zip(_list_names(name, leaf), parts, strict=True):
      yield each, np.asarray(_TO_HF[op](np.asarray(part)), order="C")


def _list_names(name: str, shape: Shape | AnyArray) -> list[str]:
  """Lists the tensor names of a parameter: one, or one per layer."""
  return [name.format(i) for i in range(shape.shape[0])] if "{}" in name else [name]


# Checks.


def _check_known(table: NameTable, paths: Iterable[str]) -> None:
  unknown = sorted(set(paths) - set(table))
  if unknown:
    raise ValueError(
      f"parameters without a name in the checkpoint: {unknown}. Add them to the "
      "family's table HF."
    )


def _shorten(names: list[str]) -> str:
  more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
  return f"{names[:MAX_NAMES]}{more}"


def _check_tensors(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Checks that a checkpoint has exactly these tensors, in these shapes."""
  missing = sorted(set(shapes) - set(tensors))
  unused = sorted(set(tensors) - set(shapes))
  if missing or unused:
    raise ValueError(
      f"missing from the checkpoint: {_shorten(missing)}; unused in the checkpoint: "
      f"{_shorten(unused)}. Give the complete checkpoint of this model."
    )
  wrong = [
    f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}"
    for name, shape in shapes.items()
    if tuple(tensors[name].shape) != shape
  ]
  if wrong:
    rest = len(wrong) - MAX_NAMES
    more = f"\n  and {rest} more" if rest > 0 else ""
    raise ValueError(
      "the shapes of the tensors differ from the config. Give the config.json of these "
      "weights.\n  " + "\n  ".join(wrong[:MAX_NAMES]) + more
    )


def get_hf_shapes(table: NameTable, shapes: Params) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors that parameters of `shapes` are converted from.

  Raises:
    ValueError: A parameter is not in the table.
  """
  flat = _flatten(shapes)
  _check_known(table, flat)
  hf_shapes: dict[str, tuple[int, ...]] = {}
  for path, shape in flat.items():
    name, op = table[path]
    layer = shape.shape[1:] if "{}" in name else shape.shape
    hf_shape = jax.eval_shape(_TO_HF[op], Shape(layer, shape.dtype)).shape
    hf_shapes |= dict.fromkeys(_list_names(name, shape), hf_shape)
  return hf_shapes


# Reading.


def _read_slice(
  source: TensorParts, shape: Shape, index: tuple[slice, ...]
) -> np.ndarray:
  """Reads a slice of a parameter into host memory, a few rows of a tensor per step."""
  own = [range(*i.indices(n)) for i, n in zip(index, shape.shape, strict=True)]
  out = allocate_aligned(tuple(map(len, own)), shape.dtype)
  axes = [slice(i.start, i.stop) for i in own[source.stacked :]]
  read = functools.partial(_read_layer, op=source.op, axes=axes)
  with ThreadPoolExecutor(_READERS) as pool:  # It starts as many as it needs.
    [*pool.map(read, out if source.stacked else [out], source.parts)]
  return out


def _read_layer(out: np.ndarray, part: Part, *, op: str, axes: Sequence[slice]) -> None:
  """Reads a slice of a tensor into `out`."""
  if not axes:
    out[...] = part[()]
    return
  rows, *others = axes[::-1] if op else axes
  rest = others if op in ("", "T") else [slice(None)] * (len(part.shape) - 1)
  count = max(1, _CHUNK_BYTES * part.shape[0] // part.nbytes)
  for start in range(rows.start, rows.stop, count):
    stop = min(start + count, rows.stop)
    piece = _FROM_HF[op](part[(slice(start, stop), *rest)])
    piece = piece if op in ("", "T") else piece[axes[0]]
    written = slice(start - rows.start, stop - rows.start)
    out[(..., written) if op else written] = piece


def _is_read_to_host(source: TensorParts, sharding: NamedSharding) -> bool:
  """Returns whether the host converts a parameter, instead of the devices.

  Devices convert in compiled programs, which take longer than to read a small
  parameter. On a CPU the host's array is the shard.
  """
  on_host = sharding.mesh.devices.flat[0].platform in _HOST_PLATFORMS
  return on_host or sum(part.nbytes for part in source.parts) <= _CHUNK_BYTES


def _load_to_mesh(source: TensorParts, shape: Shape, sharding: NamedSharding) -> Array:
  layer_sharding = _drop_layer_axis(sharding) if source.stacked else sharding
  if _is_read_to_host(source, sharding):
    read = functools.partial(_read_slice, source, shape)
    return jax.make_array_from_callback(shape.shape, sharding, read)
  out = jnp.zeros(shape.shape, shape.dtype, device=sharding)
  for i, part in enumerate(source.parts):
    out = _load_layer(out, i, part, source.op, sharding, layer_sharding)
  return out


def _load_packed(
  source: TensorParts, shape: Shape, packed: PackedKernel, sharding: NamedSharding
) -> dict[str, Array]:
  layers, *layer_shape = shape.shape
  layer = Shape(tuple(layer_shape), shape.dtype)
  out = {
    leaf: jnp.zeros((layers, *x.shape), x.dtype, device=packed.shardings[leaf])
    for leaf, x in jax.eval_shape(packed.pack, layer).items()
  }
  shardings = tuple(x.sharding for x in jax.tree.leaves(out))
  layer_sharding = _drop_layer_axis(sharding)
  for i, part in enumerate(source.parts):
    one = _load_to_mesh(TensorParts([part], source.op, False), layer, layer_sharding)
    out = _write_packed(out, one, i, packed.pack, shardings)
    jax.block_until_ready(out)
    one.delete()  # Before the next layer is read.
  return out


def _load_layer(
  out: Array,
  i: int,
  part: Part,
  op: str,
  sharding: NamedSharding,
  layer_sharding: NamedSharding,
) -> Array:
  """Returns `out` with a tensor as its layer i, or as all of it if not stacked.

  Each host reads what its devices hold, a few rows of each shard per step, in the order
  of the file. The devices transpose, cast and write the rows.
  """
  stacked = sharding is not layer_sharding
  source = _source_sharding(layer_sharding, out.ndim - stacked, op)
  for rows in _cut_shards(part, source):
    chunk = _read_shard_rows(part, source, rows)
    row = rows[0].start if rows else 0
    out = _write_rows(out, chunk, i, row, op, sharding, layer_sharding)
    # Without this, the host would read ahead and hold more chunks.
    out.block_until_ready()
  return out


def _drop_layer_axis(sharding: NamedSharding) -> NamedSharding:
  """Returns the sharding of one layer of a stacked parameter."""
  layers, *rest = sharding.spec or (None,)
  if layers is not None:
    raise ValueError(
      f"{sharding.spec} splits the layers, but layers are read one at a time. Set the "
      "first axis of a stacked parameter to None."
    )
  return NamedSharding(sharding.mesh, PartitionSpec(*rest))


def _source_sharding(sharding: NamedSharding, axes: int, op: str) -> NamedSharding:
  """Returns the sharding of a tensor whose parameter has `sharding`."""
  spec = (*sharding.spec, *[None] * (axes - len(sharding.spec)))
  return NamedSharding(sharding.mesh, _HF_SPECS[op](spec))


def _cut_shards(part, source: NamedSharding) -> Iterator[tuple[slice, ...]]:
  """Yields the rows of each step, relative to a shard; () for a scalar.

  A step has about _CHUNK_BYTES for all devices of a process. All steps have the same
  number of rows, because each number is compiled. The last step may overlap.
  """
  shape = source.shard_shape(part.shape)
  if not shape:
    yield ()
    return
  devices = max(1, source.mesh.size // jax.process_count())
  size = math.prod(shape) * np.dtype(part.dtype).itemsize * devices
  count = max(1, min(shape[0], _CHUNK_BYTES * shape[0] // size))
  for start in range(0, shape[0], count):
    start = min(start, shape[0] - count)
    yield (slice(start, start + count),)


def _read_shard_rows(part, source: NamedSharding, rows: tuple[slice, ...]) -> Array:
  """Reads these rows of every shard of a tensor."""
  if not rows:
    return jax.make_array_from_callback(part.shape, source, part.__getitem__)
  local, length = rows[0], source.shard_shape(part.shape)[0]
  count = local.stop - local.start

  def read(index):
    shard = (index[0].start or 0) // count
    first = shard * length + local.start
    return part[(slice(first, first + count), *index[1:])]

  shape = (part.shape[0] // length * count, *part.shape[1:])
  return jax.make_array_from_callback(shape, source, read)


@functools.partial(
  jax.jit, donate_argnums=0, static_argnames=("op", "sharding", "layer_sharding")
)
def _write_rows(
  out: Array,
  chunk: Array,
  layer: Number,
  row: Number,
  op: str,
  sharding: NamedSharding,
  layer_sharding: NamedSharding,
) -> Array:
  """Converts rows of every shard of a tensor and writes them into a parameter.

  `row` is the first row, relative to the shard. `layer` is ignored if `out` is not
  stacked.
  """
  converted = _FROM_HF[op](chunk).astype(out.dtype)
  converted = jax.lax.with_sharding_constraint(converted, layer_sharding)
  stacked = out.ndim - converted.ndim
  start = [layer] * stacked + [0] * converted.ndim
  if converted.ndim:  # Rows of the tensor are on the last axis, or on the first one.
    start[-1 if op else stacked] = row

  def write(out, rows, start):
    return jax.lax.dynamic_update_slice(out, rows[(None,) * stacked], start)

  specs = sharding.spec, layer_sharding.spec, PartitionSpec()
  return jax.shard_map(
    write, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec
  )(out, converted, start)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("pack", "shardings"))
def _write_packed(out, layer: Array, i: Number, pack, shardings: tuple):
  # XLA's CPU compiler copies a whole bfloat16 array for out.at[i].set.
  put = lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)
  out = jax.tree.map(put, out, pack(layer))
  # Without this, the compiler leaves small arrays such as scales on one device.
  shardings = jax.tree.unflatten(jax.tree.structure(out), shardings)
  return jax.lax.with_sharding_constraint(out, shardings)
