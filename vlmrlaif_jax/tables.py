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

from vlmrlaif_jax.tensors import Tensor, nbytes, whole
from vlmrlaif_jax.types import Params

# Path of ours -> (name of theirs, "T" to transpose, "conv" to flatten, or ""); {} in
# a name stands for the layer, and the layers are stacked on axis 0.
Table: TypeAlias = Mapping[str, tuple[str, str]]
Tensors: TypeAlias = Mapping[str, Tensor] | Mapping[str, np.ndarray]
AnyArray: TypeAlias = Array | np.ndarray


class Packed(NamedTuple):
  """How a stacked parameter is kept as a few others, made of one layer at a time."""

  pack: Callable[[AnyArray], dict[str, AnyArray]]  # Of a layer; see quant.SCHEMES.
  at: Mapping[str, NamedSharding]  # Of what pack returns, stacked; {}: on the host.


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
# How theirs are split so that ours are split by these axes. Convolutions are small.
_SPEC = {
  "": lambda axes: PartitionSpec(*axes),
  "T": lambda axes: PartitionSpec(*axes[::-1]),
  "conv": lambda axes: PartitionSpec(),
}

_flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")
_unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")


def from_hf(
  table: Table,
  tensors: Tensors,
  shapes: Params,
  at: Params | None = None,
  came: Callable[[int], None] = lambda count: None,
  packed: Mapping[str, Packed] = MappingProxyType({}),
) -> Params:
  """Parameters of the shapes and dtypes of `shapes`, from a checkpoint's tensors.

  Nothing is read, and no memory taken on a device, before all is known to fit. Then
  one tensor of one layer is read at a time, and of it only what this process's
  devices hold. What is to be packed is packed before the next one is read.

  Args:
    table: where each parameter comes from.
    tensors: the checkpoint; by name.
    shapes: what jax.eval_shape says of the model's "params".
    at: the sharding of each parameter; None: NumPy arrays are returned.
    came: takes the bytes of each tensor once it is there.
    packed: by the path of the parameter, in the place of whose last name stand those
      of what it is packed into.

  Raises:
    ValueError: parameters that the table does not know, tensors that are missing,
      of a wrong shape, or that nothing used.
  """
  wants = _flatten(shapes)
  _check_known(table, wants)
  sources = {path: _names(table[path][0], want) for path, want in wants.items()}
  _check_names(sources, tensors)
  _check_shapes(table, sources, tensors, wants)
  places = _flatten(at) if at is not None else {}
  params = {}
  for path, want in wants.items():
    parts = _told((tensors[name] for name in sources[path]), came)
    name, op = table[path]
    if path in packed:
      read = _packed_on_mesh if at is not None else _packed_on_host
      leaves = read(parts, want, op, packed[path], places.get(path))
      module = path.rpartition("/")[0]
      params |= {f"{module}/{leaf}": x for leaf, x in leaves.items()}
      continue
    read = _on_mesh if at is not None else _on_host
    params[path] = read(parts, want, op, "{}" in name, places.get(path))
  return _unflatten(params)


def to_hf(table: Table, params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """A checkpoint's tensors from our parameters, one at a time; undoes from_hf.

  Raises:
    ValueError: parameters that the table does not know.
  """
  flat = _flatten(params)
  _check_known(table, flat)
  for path, leaf in flat.items():
    name, op = table[path]
    if "{}" in name:
      for i, layer in enumerate(leaf):
        yield name.format(i), _TO[op](np.asarray(layer))
    else:
      yield name, _TO[op](np.asarray(leaf))


def _names(name: str, want: jax.ShapeDtypeStruct | Array | np.ndarray) -> list[str]:
  """The names of a parameter's tensors: one, or one for each layer."""
  return [name.format(i) for i in range(want.shape[0])] if "{}" in name else [name]


def _told(parts, came):
  for part in parts:
    yield part
    came(nbytes(part))


# Checks.


def _check_known(table: Table, paths: Iterable[str]) -> None:
  unknown = sorted(set(paths) - set(table))
  if unknown:
    raise ValueError(f"parameters without a name in the checkpoint: {unknown}")


def _check_names(sources: Mapping[str, list[str]], tensors: Tensors) -> None:
  used = {name for names in sources.values() for name in names}
  missing, unused = sorted(used - set(tensors)), sorted(set(tensors) - used)
  if missing or unused:
    raise ValueError(
      f"missing from the checkpoint: {missing}; of no use in it: {unused}"
    )


def _check_shapes(table, sources, tensors, wants) -> None:
  wrong = []
  for path, names in sources.items():
    want = _their_shape(table[path], wants[path])
    wrong += [
      f"{name} must have shape {want}; it has {tuple(tensors[name].shape)}"
      for name in names
      if tuple(tensors[name].shape) != want
    ]
  if wrong:
    more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise ValueError(
      "the tensors are not of the sizes that the config says:\n  "
      + "\n  ".join(wrong[:5])
      + more
    )


def _their_shape(entry: tuple[str, str], want) -> tuple[int, ...]:
  """Of the tensor, or of each layer's, that a parameter comes from."""
  name, op = entry
  one = want.shape[1:] if "{}" in name else want.shape
  return jax.eval_shape(_TO[op], jax.ShapeDtypeStruct(one, want.dtype)).shape


def their_shapes(table: Table, shapes: Params) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor that parameters of these shapes come from."""
  return {
    name: _their_shape(table[path], want)
    for path, want in _flatten(shapes).items()
    for name in _names(table[path][0], want)
  }


# Reading.


def _on_host(parts, want, op, stacked, _) -> np.ndarray:
  out = np.empty(want.shape, want.dtype)
  rows = out if stacked else out[None]
  for i, part in enumerate(parts):
    rows[i] = _FROM[op](whole(part))
  return out


def _packed_on_host(parts, want, op, packed: Packed, _) -> dict[str, np.ndarray]:
  turn = lambda part: np.asarray(_FROM[op](whole(part)), want.dtype)
  layers = [packed.pack(turn(part)) for part in parts]
  return {leaf: np.stack([layer[leaf] for layer in layers]) for leaf in layers[0]}


def _on_mesh(parts, want, op, stacked, place: NamedSharding) -> Array:
  """Each host reads what its devices hold, in the order of the file; the devices turn
  and cast it, and write it where it belongs."""
  if stacked:
    out = jnp.zeros(want.shape, want.dtype, device=place)
    return _stack_on_mesh(parts, want, op, place, out, _as_it_is)
  theirs, dtype = _theirs(place, len(want.shape), op), jnp.dtype(want.dtype)
  turn = lambda part: _turn(_there(part, theirs), op, dtype, place)
  (out,) = [turn(part).block_until_ready() for part in parts]
  return out


def _packed_on_mesh(
  parts, want, op, packed: Packed, place: NamedSharding
) -> dict[str, Array]:
  layer = jax.ShapeDtypeStruct(want.shape[1:], want.dtype)
  out = {
    leaf: jnp.zeros((want.shape[0], *x.shape), x.dtype, device=packed.at[leaf])
    for leaf, x in jax.eval_shape(packed.pack, layer).items()
  }
  return _stack_on_mesh(parts, want, op, place, out, packed.pack)


def _stack_on_mesh(parts, want, op, place, out, pack):
  """`out` with each layer, packed, in its place."""
  theirs, dtype = _theirs(place, len(want.shape), op, stacked=True), want.dtype
  at = tuple(x.sharding for x in jax.tree.leaves(out))
  for i, part in enumerate(parts):
    there = _there(part, theirs)
    out = _write(out, there, i, op, jnp.dtype(dtype), pack, at)
    del there
    # Or the host would read on, and hold more than one tensor.
    jax.block_until_ready(out)
  return out


def _theirs(
  place: NamedSharding, axes: int, op: str, *, stacked: bool = False
) -> NamedSharding:
  """Of a tensor in the file's order, of which ours is to be split as `place` says."""
  spec = (*place.spec, *[None] * (axes - len(place.spec)))
  return NamedSharding(place.mesh, _SPEC[op](spec[1:] if stacked else spec))


def _there(part, theirs: NamedSharding) -> Array:
  return jax.make_array_from_callback(part.shape, theirs, part.__getitem__)


_as_it_is = lambda layer: layer


@functools.partial(
  jax.jit, donate_argnums=0, static_argnames=("op", "dtype", "pack", "at")
)
def _write(out, part: Array, i: Int[Array, ""] | int, op: str, dtype, pack, at: tuple):
  # Not out.at[i].set, for which XLA's CPU compiler copies a bfloat16 array whole.
  put = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, i, 0)
  out = jax.tree.map(put, out, pack(_FROM[op](part).astype(dtype)))
  # Or the compiler would leave small ones, such as scales, where it has made them.
  at = jax.tree.unflatten(jax.tree.structure(out), at)
  return jax.lax.with_sharding_constraint(out, at)


@functools.partial(jax.jit, static_argnames=("op", "dtype", "place"))
def _turn(part: Array, op: str, dtype: np.dtype, place: NamedSharding) -> Array:
  turned = _FROM[op](part).astype(dtype)
  return jax.lax.with_sharding_constraint(turned, place)
