"""Where the parameters of a run come from: checkpoints on disk, or shapes alone."""

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
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.training import checkpoint


class ArrayFactory(NamedTuple):
  """How a run makes parameters.

  A real run reads and computes arrays (SAVED). The planner replaces these
  functions by ones that return shapes, so that stages build the same job for both.
  """

  # From a stage's folder and the shapes of its trained parameters to what it saved.
  restore: Callable[[pathlib.Path, Params], Params]
  has: Callable[[pathlib.Path], bool]  # Whether a folder's stage has saved parameters.
  initialize: Callable[[Params, Key[Array, ""]], Params]  # See initialize.
  zeros_like: Callable[[Params], Params]


def restore_params(folder: pathlib.Path, like: Params) -> Params:
  """Returns the parameters that a stage has saved.

  The folder's `selected.json` names the checkpoint; without one it is the last.

  Args:
    folder: of the stage.
    like: shapes and shardings of the parameters.

  Raises:
    UserError: the stage has not saved any.
  """
  selected = folder / "selected.json"
  step = read_json(selected)["step"] if selected.exists() else None
  try:
    return checkpoint.restore_saved_params(str(folder / "checkpoints"), like, step)
  except FileNotFoundError as error:
    raise UserError(f"{error}: run the stage {folder.name} first") from error


def has_checkpoint(folder: pathlib.Path) -> bool:
  """Returns whether a stage has saved parameters in its folder."""
  return checkpoint.get_latest_step(str(folder / "checkpoints")) is not None


def get_trainable_shapes(model: vlm.VLM, mesh: Mesh) -> Params:
  """Returns shapes and shardings of a model's LoRA factors, and of a scalar head."""
  shapes = vlm.get_variable_shapes(model)
  trained = {"lora": shapes["lora"]}
  if model.scalar_head:
    trained["params"] = {"head": shapes["params"]["head"]}
  return add_shardings(trained, mesh)


def add_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
  """Returns shapes of parameters, each with the sharding that vlm.SHARDING gives it."""
  where = sharding.shard_by_rules(tree, vlm.SHARDING, mesh)
  return jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where
  )


def initialize_params(shapes: Params, key: Key[Array, ""]) -> Params:
  """Returns initial values: LoRA that changes nothing, and a small random head.

  It needs the shapes alone, because compiling the model's own `init` takes longer than
  many stages.

  Args:
    shapes: see trainable_shapes.
    key: seeds the LoRA factors and the head.
  """
  he = jax.nn.initializers.he_uniform(in_axis=-2, out_axis=-1, batch_axis=0)

  def make(path, leaf):
    name = sharding.format_key_path(path)
    if name.endswith("/a"):
      value = he(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape)
    elif name.endswith("head/kernel"):
      bound = leaf.shape[0] ** -0.5  # As the original: reward_model.py:165.
      value = jax.random.uniform(key, leaf.shape, minval=-bound, maxval=bound)
    else:
      value = jnp.zeros(leaf.shape)
    return sharding.place_array(value.astype(leaf.dtype), leaf.sharding)

  return jax.tree_util.tree_map_with_path(make, shapes)


SAVED = ArrayFactory(
  restore_params,
  has_checkpoint,
  initialize_params,
  zeros_like=lambda tree: jax.tree.map(jnp.zeros_like, tree),
)
