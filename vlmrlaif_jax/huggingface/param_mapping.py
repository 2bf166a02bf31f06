"""Parameters from a checkpoint's tensors, by a table of names, into their shards."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from vlmrlaif_jax.core.types import AnyArray, Params
from vlmrlaif_jax.huggingface.tensor_files import Tensor, Tensors

# Path of ours -> (name of theirs, "T" to transpose, "conv" to flatten, or ""); {} in
# a name stands for the layer, and the layers are stacked on axis 0.
NameTable: TypeAlias = Mapping[str, tuple[str, str]]
Number: TypeAlias = Int[Array, ""] | int
Part: TypeAlias = Tensor | np.ndarray
Shape: TypeAlias = jax.ShapeDtypeStruct

_PIECE = 8 << 20  # Bytes; of a tensor, what is on its way to its place at once.


class PackedKernel(NamedTuple):
  """How a stacked parameter is kept as a few others, made of one layer at a time."""

  # Of a layer; see quantization.SCHEMES.
  pack: Callable[[AnyArray], dict[str, AnyArray]]
  at: Mapping[str, NamedSharding]  # Of what pack returns, stacked.


# [out, 3, patch, patch] <-> [patch * patch * 3, out]
_flat = lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
_square = lambda x, side: x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)

# From their tensors to ours, and back.
_FROM = {"": lambda x: x, "T": lambda x: x.T, "conv": _flat}
_TO = {
  "": lambda x: x,
  "T": lambda x: x.T,
  "conv": lambda x: _square(x, math.isqrt(x.shape[0] // 3)),
}
# How theirs are split so that ours are split by these axes. Convolutions are small, so
# only their filters, which are theirs' rows, are.
_SPEC = {
  "": lambda axes: PartitionSpec(*axes),
  "T": lambda axes: PartitionSpec(*axes[::-1]),
  "conv": lambda axes: PartitionSpec(axes[-1]),
}

_flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")
_unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")


def from_hf(
  table: NameTable,
  tensors: Tensors,
  shapes: Params,
  at: Params | None = None,
  came: Callable[[int], None] = lambda count: None,
  packed: Mapping[str, PackedKernel] = MappingProxyType({}),
) -> Params:
  """Parameters of the shapes and dtypes of `shapes`, from a checkpoint's tensors.

  Nothing is read, and no memory taken on a device, before all is known to fit. Then a
  few rows of one tensor are read at a time, of them only what this process's devices
  hold, and put where they belong. A layer that is to be packed is packed before the
  next one is read.

  Args:
    table: where each parameter comes from.
    tensors: the checkpoint; by name.
    shapes: what jax.eval_shape says of the model's "params".
    at: the sharding of each parameter; None: NumPy arrays are returned.
    came: takes the bytes of each tensor once it is there.
    packed: by the path of the parameter, in the place of whose last name stand those
      of what it is packed into. On the host nothing is packed.

  Raises:
    ValueError: parameters that the table does not know, tensors that are missing,
      of a wrong shape, or that nothing used; a sharding that splits layers.
  """
  _check(tensors, get_hf_shapes(table, shapes))
  places = None if at is None else _flatten(at)
  params: dict[str, AnyArray] = {}
  for path, want in _flatten(shapes).items():
    name, op = table[path]
    parts = _told((tensors[each] for each in _names(name, want)), came)
    if places is None:
      params[path] = _on_host(parts, want, op, "{}" in name)
    elif path in packed:
      leaves = _packed_on_mesh(parts, want, op, packed[path], places[path])
      module = path.rpartition("/")[0]
      params |= {f"{module}/{leaf}": x for leaf, x in leaves.items()}
    else:
      params[path] = _on_mesh(parts, want, op, "{}" in name, places[path])
  return _unflatten(params)


def to_hf(table: NameTable, params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """A checkpoint's tensors from our parameters, one at a time; undoes from_hf.

  Raises:
    ValueError: parameters that the table does not know.
  """
  flat = _flatten(params)
  _check_known(table, flat)
  for path, leaf in flat.items():
    name, op = table[path]
    parts = leaf if "{}" in name else [leaf]
    for each, part in zip(_names(name, leaf), parts, strict=True):
      yield each, np.asarray(_TO[op](np.asarray(part)), order="C")


def _names(name: str, want: Shape | AnyArray) -> list[str]:
  """The names of a parameter's tensors: one, or one for each layer."""
  return [name.format(i) for i in range(want.shape[0])] if "{}" in name else [name]


def _told(parts, came):
  for part in parts:
    yield part
    came(part.nbytes)


# Checks.


def _check_known(table: NameTable, paths: Iterable[str]) -> None:
  unknown = sorted(set(paths) - set(table))
  if unknown:
    raise ValueError(f"parameters without a name in the checkpoint: {unknown}")


def _check(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises unless a checkpoint has exactly these tensors, in these shapes."""
  missing = sorted(set(shapes) - set(tensors))
  unused = sorted(set(tensors) - set(shapes))
  if missing or unused:
    raise ValueError(
      f"missing from the checkpoint: {missing}; of no use in it: {unused}"
    )
  wrong = [
    f"{name} must have shape {want}; it has {tuple(tensors[name].shape)}"
    for name, want in shapes.items()
    if tuple(tensors[name].shape) != want
  ]
  if wrong:
    more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise ValueError(
      "the tensors are not of the sizes that the config says:\n  "
      + "\n  ".join(wrong[:5])
      + more
    )


def get_hf_shapes(table: NameTable, shapes: Params) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor that parameters of these shapes come from.

  Raises:
    ValueError: parameters that the table does not know.
  """
  wants = _flatten(shapes)
  _check_known(table, wants)
  found: dict[str, tuple[int, ...]] = {}
  for path, want in wants.items():
    name, op = table[path]
    layer = want.shape[1:] if "{}" in name else want.shape
    theirs = jax.eval_shape(_TO[op], Shape(layer, want.dtype)).shape
    found |= dict.fromkeys(_names(name, want), theirs)
  return found


# Reading.


def _on_host(parts: Iterable[Part], want: Shape, op: str, stacked: bool) -> np.ndarray:
  out = np.empty(want.shape, want.dtype)
  layers = out if stacked else out[None]
  for i, part in enumerate(parts):
    layers[i, ...] = _FROM[op](part[(slice(None),) * len(part.shape)])
  return out


def _on_mesh(
  parts: Iterable[Part], want: Shape, op: str, stacked: bool, place: NamedSharding
) -> Array:
  out = jnp.zeros(want.shape, want.dtype, device=place)
  layer = _of_layer(place) if stacked else place
  for i, part in enumerate(parts):
    out = _fill(out, i, part, op, place, layer)
  return out


def _packed_on_mesh(
  parts: Iterable[Part],
  want: Shape,
  op: str,
  packed: PackedKernel,
  place: NamedSharding,
) -> dict[str, Array]:
  layers, *shape = want.shape
  one = Shape(tuple(shape), want.dtype)
  out = {
    leaf: jnp.zeros((layers, *x.shape), x.dtype, device=packed.at[leaf])
    for leaf, x in jax.eval_shape(packed.pack, one).items()
  }
  at = tuple(x.sharding for x in jax.tree.leaves(out))
  layer = _of_layer(place)
  # The same for all layers: memory that is given back is not always used again.
  read = jnp.zeros(one.shape, one.dtype, device=layer)
  for i, part in enumerate(parts):
    read = _fill(read, 0, part, op, layer, layer)
    out = _pack(out, read, i, packed.pack, at)
    jax.block_until_ready(out)
  return out


def _fill(
  out: Array, i: int, part, op: str, place: NamedSharding, layer: NamedSharding
) -> Array:
  """`out` with a tensor as its layer i or, where these are not stacked, as all of it.

  Each host reads what its devices hold, a few rows of each shard at a time, in the
  order of the file; the devices turn and cast them, and write them where they belong.
  """
  stacked = place is not layer
  theirs = _theirs(layer, out.ndim - stacked, op)
  for rows in _cut_shards(part, theirs):
    piece = _turn(_there(part, theirs, rows), op, out.dtype, layer)
    out = _write(out, piece, i, rows[0].start if rows else 0, bool(op), place)
    # Or the host would read on, and hold more.
    out.block_until_ready()
  return out


def _of_layer(place: NamedSharding) -> NamedSharding:
  """Of one of the layers that are stacked."""
  layers, *rest = place.spec or (None,)
  if layers is not None:
    raise ValueError(
      f"{place.spec} splits the layers, which are read one at a time: give None for "
      "the first axis of a stacked parameter"
    )
  return NamedSharding(place.mesh, PartitionSpec(*rest))


def _theirs(place: NamedSharding, axes: int, op: str) -> NamedSharding:
  """Of a tensor in the file's order, of which ours is to be split as `place` says."""
  spec = (*place.spec, *[None] * (axes - len(place.spec)))
  return NamedSharding(place.mesh, _SPEC[op](spec))


def _cut_shards(part, theirs: NamedSharding) -> Iterator[tuple[slice, ...]]:
  """The rows of each shard of a tensor, _PIECE bytes at a time for all devices of a
  process; () of a number.

  All are as many, lest each number of them be compiled: the last may overlap.
  """
  shape = theirs.shard_shape(part.shape)
  if not shape:
    yield ()
    return
  devices = max(1, theirs.mesh.size // jax.process_count())
  size = math.prod(shape) * np.dtype(part.dtype).itemsize * devices
  count = max(1, min(shape[0], _PIECE * shape[0] // size))
  for start in range(0, shape[0], count):
    start = min(start, shape[0] - count)
    yield (slice(start, start + count),)


def _there(part, theirs: NamedSharding, rows: tuple[slice, ...]) -> Array:
  """These rows of every shard of a tensor."""
  if not rows:
    return jax.make_array_from_callback(part.shape, theirs, part.__getitem__)
  (local,), length = rows, theirs.shard_shape(part.shape)[0]
  count = local.stop - local.start

  def read(index):
    shard = (index[0].start or 0) // count
    first = shard * length + local.start
    return part[(slice(first, first + count), *index[1:])]

  shape = (part.shape[0] // length * count, *part.shape[1:])
  return jax.make_array_from_callback(shape, theirs, read)


@functools.partial(jax.jit, static_argnames=("op", "dtype", "place"))
def _turn(part: Array, op: str, dtype: np.dtype, place: NamedSharding) -> Array:
  turned = _FROM[op](part).astype(dtype)
  return jax.lax.with_sharding_constraint(turned, place)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("last", "place"))
def _write(
  out: Array, piece: Array, layer: Number, row: Number, last: bool, place
) -> Array:
  """A parameter with a piece of every shard, which _turn has made, in its place.

  Apart from _turn, since XLA's CPU compiler turns ten times slower in the midst of
  something else.

  Args:
    layer: which one, if they are stacked.
    row: of the shard, where the piece begins.
    last: whether rows are the last axis of ours, not the first.
  """
  stacked = out.ndim - piece.ndim
  # XLA's CPU compiler would turn all of a bfloat16 array to float32 and back.
  on_cpu = place.mesh.devices.flat[0].platform == "cpu"
  bits = f"uint{8 * out.dtype.itemsize}" if on_cpu else out.dtype
  at = [layer] * stacked + [0] * piece.ndim
  if piece.ndim:
    at[-1 if last else stacked] = row

  def write(out, piece, at):
    as_bits = lambda x: jax.lax.bitcast_convert_type(x, bits)
    piece = as_bits(piece)[(None,) * stacked]
    written = jax.lax.dynamic_update_slice(as_bits(out), piece, at)
    return jax.lax.bitcast_convert_type(written, out.dtype)

  specs = place.spec, PartitionSpec(*place.spec[stacked:]), PartitionSpec()
  return jax.shard_map(write, mesh=place.mesh, in_specs=specs, out_specs=place.spec)(
    out, piece, at
  )


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("pack", "at"))
def _pack(out, layer: Array, i: Number, pack, at: tuple):
  # Not out.at[i].set, for which XLA's CPU compiler copies a bfloat16 array whole.
  put = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, i, 0)
  out = jax.tree.map(put, out, pack(layer))
  # Or the compiler would leave small ones, such as scales, where it has made them.
  at = jax.tree.unflatten(jax.tree.structure(out), at)
  return jax.lax.with_sharding_constraint(out, at)
