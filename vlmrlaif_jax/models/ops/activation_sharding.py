"""Activations over the mesh that jax.set_mesh has set; without one, nothing happens.

Its axes are those of sharding.AXES. Left to itself, a compiler may move activations to
where a weight's shards are, instead of the weight to them.
"""

import math

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

BATCH_AXES = ("data", "fsdp")  # The mesh axes that rows are spread over,
TIME_AXIS = "context"  # that tokens of a row are, in passes over whole rows,
HEADS_AXIS = "tensor"  # and that heads are.


def axis_size(axes: str | tuple[str, ...]) -> int:
  """How many parts the mesh makes of an axis that is spread so; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  names = (axes,) if isinstance(axes, str) else axes
  return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)


def constrain(
  x: Shaped[Array, "..."], *over: str | tuple[str, ...]
) -> Shaped[Array, "..."]:
  """x, its first axes spread over these of the mesh, the others whole.

  An axis that its part of the mesh does not divide is left to the compiler.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = [
    P.UNCONSTRAINED if size % axis_size(axes) else axes
    for size, axes in zip(x.shape, over, strict=False)
  ]
  return jax.lax.with_sharding_constraint(x, P(*spec))
