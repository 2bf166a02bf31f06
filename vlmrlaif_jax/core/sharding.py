"""The device mesh, sharding rules by parameter path, and placement of arrays."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree, Shaped

# "data" replicates weights, "fsdp" shards them and gathers them for use, "context"
# shards the time axis of rows, and "tensor" shards matrices.
AXES = ("data", "fsdp", "context", "tensor")
BATCH_SPEC = P(("data", "fsdp"))  # Sharding of a batch; other axes share its rows.

Rules = Sequence[tuple[str, P]]  # (regex, spec) for leaves whose path matches.


def make_mesh(
  data: int = 1,
  fsdp: int = -1,
  context: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Creates a mesh of AXES over all devices.

  One size may be -1: it is then the number of devices divided by the other sizes.

  Args:
    data: Copies of the weights. Each copy has its own rows of a batch.
    fsdp: Shards of the weights. Each shard has its own rows of a batch.
    context: Parts of each row.
    tensor: Parts of the attention heads and of the MLP's columns.
    devices: Devices of the mesh, None for all. Compilation ahead of time passes others.

  Raises:
    ValueError: The product of the sizes is not the number of devices.
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
  # A plain embedding lookup fails with explicit axes, which are JAX's default.
  types = (AxisType.Auto,) * len(AXES)
  # jax.make_mesh splits the physical axes of a v5e's torus, but not of other TPUs'.
  grid = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=types)


def num_batch_shards(mesh: Mesh) -> int:
  """Returns the number of shards into which the rows of a batch are divided."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def format_key_path(key_path: tuple) -> str:
  """Formats a pytree key path as "a/b/c", the form that sharding rules match."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def shard_by_rules(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
  """Returns a NamedSharding for every leaf, from the first rule that matches.

  Args:
    tree: Arrays or ShapeDtypeStructs of parameters, of an optimizer state, or of both.
    rules: Each regex is searched in the leaf's path. Scalars need no rule.
    mesh: The mesh whose axes the rules name.

  Raises:
    ValueError: No rule matches a leaf, or the mesh does not divide it.
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
      f'such as ("{path}", PartitionSpec()) to replicate it on every device'
    )

  return jax.tree_util.tree_map_with_path(sharding, tree)


def local_row_shards(mesh: Mesh, process: int) -> list[int]:
  """Returns the indices of the row shards on a process's devices, in order.

  They may be separated, and other processes may have copies: the chips of a TPU host
  form a square of the torus, while the axes of the mesh are lines through it.
  """
  # Rows are sharded over the first two axes of the mesh.
  groups = mesh.devices.reshape(num_batch_shards(mesh), -1)
  is_local = lambda group: any(device.process_index == process for device in group)
  return [number for number, group in enumerate(groups) if is_local(group)]


def process_row_indices(
  mesh: Mesh, process: int, count: int
) -> Int[np.ndarray, " rows"]:
  """Returns the indices of a process's rows in a batch of `count` rows.

  Raises:
    ValueError: The row shards of the mesh do not divide the rows.
  """
  shards = num_batch_shards(mesh)
  if count % shards:
    raise ValueError(
      f"{count} rows do not divide by the {shards} row shards (data x fsdp) of "
      f"{_format_mesh(mesh)}: set the batch size to a multiple of {shards}, or raise "
      "--config.mesh.tensor"
    )
  return (
    np.arange(count).reshape(shards, -1)[local_row_shards(mesh, process)].reshape(-1)
  )


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
  """Places a host batch on the devices, its rows sharded over "data" and "fsdp".

  Args:
    batch: NumPy arrays, rows first. With several processes, only the rows of this
      process; see `process_row_indices`.
    mesh: Mesh of all processes.

  Raises:
    ValueError: The row shards of this process do not divide the rows.
  """
  several, shards = jax.process_count() > 1, num_batch_shards(mesh)
  local = local_row_shards(mesh, jax.process_index()) if several else range(shards)
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if leaf.ndim == 0 or leaf.shape[0] % len(local):
      raise ValueError(
        f"{format_key_path(path)} of shape {leaf.shape}: its rows do not divide by the "
        f"{len(local)} row shards (data x fsdp) that this process has of "
        f"{_format_mesh(mesh)}: set the batch size to a multiple of {shards}, or raise "
        "--config.mesh.tensor"
      )
  if not several:
    return jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
  return jax.tree.map(lambda x: _put_shards(x, local, mesh), batch)


def _put_shards(
  x: Shaped[np.ndarray, "rows ..."], local: Sequence[int], mesh: Mesh
) -> Array:
  """Returns the global array of all processes' rows; `x` has the shards `local`."""
  size = len(x) // len(local)

  def read(index):
    first = local.index((index[0].start or 0) // size) * size
    return x[first : first + size]

  shape = (size * num_batch_shards(mesh), *x.shape[1:])
  return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH_SPEC), read)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Replicates arrays on every device. Every process must pass the same values."""
  return jax.tree.map(lambda x: place_array(x, NamedSharding(mesh, P())), tree)


def place_array(
  x: Shaped[Array, "..."] | Shaped[np.ndarray, "..."], at: Sharding
) -> Array:
  """Places an array. Every process must pass the same values.

  Each process sends only the shards of its own devices. device_put would compare the
  values of all processes over the network.
  """
  if at.is_fully_addressable:
    return jax.device_put(x, at)
  whole = np.asarray(x)
  return jax.make_array_from_callback(whole.shape, at, whole.__getitem__)


def _check_divides(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
  if len(spec) > len(shape):
    raise ValueError(
      f"the sharding rule of {path} has {len(spec)} axes, {spec}, but the leaf has "
      f"shape {shape}: use a rule with at most {len(shape)} axes"
    )
  for size, axes in zip(shape, spec, strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if size % ways:
      raise ValueError(
        f"{path} of shape {shape}: its axis of {size} does not divide by "
        f"{' x '.join(axes)} = {ways} of {_format_mesh(mesh)}: choose a mesh that "
        "divides it, or set this axis of the rule to None"
      )


def _format_mesh(mesh: Mesh) -> str:
  return "mesh " + " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
