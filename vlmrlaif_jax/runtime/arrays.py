"""Parameters of a run: read from checkpoints, initialized, or shapes alone.

`SAVED` is the factory of a real run; the planner has one that returns shapes.
"""

import pathlib
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.huggingface import families
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.models.layers import lora_initializer
from vlmrlaif_jax.training import checkpoint


class ArrayFactory(NamedTuple):
  """Functions that return a run's parameters.

  A real run reads and computes arrays (SAVED). The planner replaces these
  functions by ones that return shapes, so that stages build the same job for both.
  """

  # Restores a stage's parameters, from its folder and their shapes; see restore_params.
  restore: Callable[[pathlib.Path, Params], Params]
  has: Callable[[pathlib.Path], bool]  # Whether a stage's folder has a checkpoint.
  # Initializes parameters from their shapes and a key; see initialize_params.
  initialize: Callable[[Params, Key[Array, ""]], Params]
  # Maps (path, array) to a new array of the same shape, for each leaf.
  map_leaves: Callable[[Callable[[str, Array], Array], Params], Params]


def restore_params(folder: pathlib.Path, like: Params) -> Params:
  """Restores the parameters that a stage saved.

  The folder's `selected.json` names the step; without this file it is the last one.

  Args:
    folder: the stage's folder.
    like: shapes and shardings of the parameters.

  Raises:
    UserError: the stage has no checkpoint.
  """
  selected = folder / "selected.json"
  step = read_json(selected)["step"] if selected.exists() else None
  try:
    return checkpoint.restore_saved_params(str(folder / "checkpoints"), like, step)
  except FileNotFoundError as error:
    raise UserError(f"{error}: run the stage {folder.name} first") from error


def has_checkpoint(folder: pathlib.Path) -> bool:
  """Returns whether a stage's folder has a checkpoint."""
  return checkpoint.get_latest_step(str(folder / "checkpoints")) is not None


def get_trainable_shapes(model: vlm.VLM, mesh: Mesh) -> Params:
  """Returns shapes and shardings of a model's LoRA factors and its scalar head."""
  shapes = vlm.get_variable_shapes(model)
  trained = {"lora": shapes["lora"]}
  if model.scalar_head:
    trained["params"] = {"head": shapes["params"]["head"]}
  return add_shardings(trained, mesh)


def add_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
  """Returns the shapes of parameters with the shardings of families.SHARDING."""
  where = sharding.shard_by_rules(tree, families.SHARDING, mesh)
  return jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where
  )


def initialize_params(shapes: Params, key: Key[Array, ""]) -> Params:
  """Initializes LoRA factors whose product is 0, and a small random scalar head.

  It requires only shapes: compiling the model's own `init` takes longer than many
  stages.

  Args:
    shapes: shapes and shardings; see get_trainable_shapes.
    key: random key of the LoRA factors and the head.
  """
  init = lora_initializer(in_axis=-2, out_axis=-1, batch_axis=0)

  def make(path, leaf):
    name = sharding.format_key_path(path)
    if name.endswith("/a"):
      value = init(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape)
    elif name.endswith("head/kernel"):
      bound = leaf.shape[0] ** -0.5  # VLM-RLAIF's code, reward_model.py:165.
      value = jax.random.uniform(key, leaf.shape, minval=-bound, maxval=bound)
    else:
      value = jnp.zeros(leaf.shape)
    return sharding.place_array(value.astype(leaf.dtype), leaf.sharding)

  return jax.tree_util.tree_map_with_path(make, shapes)


def map_leaves(fn: Callable[[str, Array], Array], tree: Params) -> Params:
  """Maps the path and the array of each leaf to a new array."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: fn(sharding.format_key_path(path), x), tree
  )


SAVED = ArrayFactory(restore_params, has_checkpoint, initialize_params, map_leaves)
