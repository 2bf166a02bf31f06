"""Where arrays live: a mesh, rules from parameter paths to its axes, placement."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree, Shaped

# Copies of everything; weights in shards, gathered where used; stretches of each row;
# matrices in shards.
AXES = ("data", "fsdp", "context", "tensor")
BATCH_SPEC = P(("data", "fsdp"))  # Of a batch: the other axes work on the same rows.

Rules = Sequence[tuple[str, P]]  # (regex, spec of a leaf whose path it is found in).


def make_mesh(
  data: int = 1,
  fsdp: int = -1,
  context: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The mesh of AXES over all devices; the one size given as -1 takes what is left.

  Args:
    data: copies of the weights, among which rows are divided.
    fsdp: parts of the weights; rows are divided among them too.
    context: parts of every row.
    tensor: parts of the heads and of the MLP's columns.
    devices: all of them by default; others for compiling ahead of time.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) == 1 and known > 0 and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"a mesh of data={data}, fsdp={fsdp}, context={context}, tensor={tensor} does "
      f"not fit {len(devices)} devices: let the product of the sizes be "
      f"{len(devices)}, or give one of them as -1 and let the others divide it"
    )
  # Explicit axes, the default, refuse a plain embedding lookup.
  types = (AxisType.Auto,) * len(AXES)
  # jax.make_mesh splits the axes of a v5e's torus, and of no other TPU's.
  laid = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(laid, AXES, axis_types=types)


def num_batch_shards(mesh: Mesh) -> int:
  """How many parts the rows of a batch are spread in."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def format_key_path(key_path: tuple) -> str:
  """A pytree key path as "a/b/c", which is what rules are matched with."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def shard_by_rules(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
  """A NamedSharding for every leaf of tree, by the first rule that matches.

  Args:
    tree: arrays or ShapeDtypeStructs; may be parameters, optimiser state, both.
    rules: each regex is searched in the leaf's path. Scalars need no rule.
    mesh: whose axes the rules name.

  Raises:
    ValueError: a leaf that no rule matches, or that the mesh does not divide.
  """

  def sharding(key_path, leaf):
    path = format_key_path(key_path)
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    for pattern, spec in rules:
      if re.search(pattern, path):
        _check_divides(path, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)
    raise ValueError(
      f"no sharding rule matches {path} of shape {leaf.shape}: add one, "
      f'such as ("{path}", PartitionSpec()) to keep it whole on every device'
    )

  return jax.tree_util.tree_map_with_path(sharding, tree)


def local_row_shards(mesh: Mesh, process: int) -> list[int]:
  """The row shards that a process's devices have, in their order.

  They need not stand together, and other processes may have them, too: a TPU host's
  chips are a square of the torus, through which the mesh's axes run in lines.
  """
  groups = mesh.devices.reshape(
    num_batch_shards(mesh), -1
  )  # ROWS are the first two axes.
  ours = lambda group: any(device.process_index == process for device in group)
  return [number for number, group in enumerate(groups) if ours(group)]


def process_row_indices(
  mesh: Mesh, process: int, count: int
) -> Int[np.ndarray, " rows"]:
  """The numbers of the rows that a process's devices have of a batch of `count`.

  Raises:
    ValueError: the rows do not spread over the mesh.
  """
  shards = num_batch_shards(mesh)
  if count % shards:
    raise ValueError(
      f"{count} rows do not spread over the {shards} row shards (data x fsdp) of "
      f"{_show(mesh)}; let the batch size be a multiple of {shards}, or give more "
      "devices to tensor"
    )
  return (
    np.arange(count).reshape(shards, -1)[local_row_shards(mesh, process)].reshape(-1)
  )


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
  """A host batch as global arrays, its rows spread over "data" and "fsdp".

  Args:
    batch: NumPy arrays, rows first. With several processes, each one's own rows, which
      `rows_of` tells.
    mesh: of all processes.
  """
  several = jax.process_count() > 1
  here = (
    local_row_shards(mesh, jax.process_index())
    if several
    else range(num_batch_shards(mesh))
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if leaf.ndim == 0 or leaf.shape[0] % len(here):
      raise ValueError(
        f"{format_key_path(path)} of shape {leaf.shape}: its rows do not spread over the "
        f"{len(here)} row shards (data x fsdp) that this process has of {_show(mesh)}; "
        f"let the batch size be a multiple of {num_batch_shards(mesh)}, or give more devices "
        "to tensor"
      )
  if not several:
    return jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
  return jax.tree.map(lambda x: _put_shards(x, here, mesh), batch)


def _put_shards(
  x: Shaped[np.ndarray, "rows ..."], here: Sequence[int], mesh: Mesh
) -> Array:
  """The array of all processes' rows, of which x has those of the shards `here`."""
  size = len(x) // len(here)

  def read(index):
    first = here.index((index[0].start or 0) // size) * size
    return x[first : first + size]

  shape = (size * num_batch_shards(mesh), *x.shape[1:])
  return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH_SPEC), read)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """The same arrays, whole on every device. Every process gives the same values."""
  return jax.tree.map(lambda x: place_array(x, NamedSharding(mesh, P())), tree)


def place_array(
  x: Shaped[Array, "..."] | Shaped[np.ndarray, "..."], at: Sharding
) -> Array:
  """Places an array; every process passes the same values.

  Each process sends what its devices hold: device_put would compare all values over
  the network.
  """
  if at.is_fully_addressable:
    return jax.device_put(x, at)
  whole = np.asarray(x)
  return jax.make_array_from_callback(whole.shape, at, whole.__getitem__)


def _check_divides(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
  if len(spec) > len(shape):
    raise ValueError(
      f"the sharding rule of {path} has {len(spec)} axes, {spec}, but the leaf has "
      f"shape {shape}: give a rule of {len(shape)} axes or fewer"
    )
  for size, axes in zip(shape, spec, strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if size % ways:
      raise ValueError(
        f"{path} of shape {shape}: its axis of {size} does not divide by "
        f"{' x '.join(axes)} = {ways} of {_show(mesh)}; choose a mesh that divides "
        "it, or None for this axis in the rule"
      )


def _show(mesh: Mesh) -> str:
  return "mesh " + " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
