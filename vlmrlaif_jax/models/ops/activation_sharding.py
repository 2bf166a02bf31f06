"""Sharding constraints of activations over the mesh of jax.set_mesh, if one is set.

Its axes are those of sharding.AXES. Without constraints, XLA may gather activations
where it should gather the shards of a weight.
"""

import math

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

BATCH_AXES = ("data", "fsdp")  # Mesh axes of the rows of a batch.
TIME_AXIS = "context"  # Mesh axis of the tokens of a row, in passes over whole rows.
HEADS_AXIS = "tensor"  # Mesh axis of attention heads.


def axis_size(axes: str | tuple[str, ...]) -> int:
  """Returns the number of shards over these mesh axes, 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  names = (axes,) if isinstance(axes, str) else axes
  return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)


def constrain(
  x: Shaped[Array, "..."], *over: str | tuple[str, ...]
) -> Shaped[Array, "..."]:
  """Shards the first axes of x over mesh axes, and replicates the other axes.

  The compiler selects the sharding of an axis that is no multiple of its shards.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = [
    P.UNCONSTRAINED if size % axis_size(axes) else axes
    for size, axes in zip(x.shape, over, strict=False)
  ]
  return jax.lax.with_sharding_constraint(x, P(*spec))
