"""Grids of patches, and what else the models of Qwen's families share."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlmrlaif_jax.models.layers import rotate_halves

AnyArrayT = TypeVar("AnyArrayT", np.ndarray, Array)


def order_patches(x: AnyArrayT, merge: int) -> AnyArrayT:
  """Flattens rows and columns of patches, so that merged patches are neighbors.

  >>> print(order_patches(np.arange(8).reshape(2, 4), merge=2))
  [0 1 4 5 2 3 6 7]

  Args:
    x: an array whose first axes are rows and columns of patches.
    merge: side of the squares of patches that are merged.
  """
  height, width, *rest = x.shape
  x = x.reshape(height // merge, merge, width // merge, merge, *rest)
  return x.swapaxes(1, 2).reshape(height * width, *rest)


def axial_angles(
  grid: tuple[int, int], merge: int, head_dim: int
) -> Float[np.ndarray, "patches angles"]:
  """Returns the rotary angles of patches: of their rows, then of their columns.

  Args:
    grid: rows and columns of patches.
    merge: see order_patches.
    head_dim: width of a head. A quarter of it is the number of frequencies.
  """
  frequency = 10_000.0 ** (-np.arange(head_dim // 4) / (head_dim // 4))
  angles = np.moveaxis(np.indices(grid), 0, -1)[..., None] * frequency
  return order_patches(angles.reshape(*grid, -1), merge).astype(np.float32)


def rotate(
  x: Float[Array, "*batch patches heads head_dim"],
  angles: Float[np.ndarray, "patches angles"],
) -> Float[Array, "*batch patches heads head_dim"]:
  """Rotates queries or keys of patches by axial_angles."""
  return rotate_halves(x, np.sin(angles)[:, None], np.cos(angles)[:, None])


def interpolate(size: int, side: int) -> Float[np.ndarray, "size side"]:
  """Returns the matrix that resamples `side` points to `size`, from end to end."""
  at = np.linspace(0, side - 1, size)[:, None]
  return np.maximum(0, 1 - np.abs(at - np.arange(side))).astype(np.float32)


def join_states(
  states: Float[Array, "states images patches embed"], merge: int
) -> Float[Array, "images tokens features"]:
  """Joins all hidden states of the patches that are merged into one token."""
  count, images, patches, embed = states.shape
  square = merge**2
  x = states.reshape(count, images, patches // square, square * embed)
  return jnp.moveaxis(x, 0, 2).reshape(images, patches // square, -1)


def split_states(
  features: Float[Array, "images tokens features"], count: int, merge: int
) -> Float[Array, "states images patches embed"]:
  """Splits what `join_states` joined into `count` hidden states."""
  images, tokens, width = features.shape
  x = jnp.moveaxis(features.reshape(images, tokens, count, width // count), 2, 0)
  return x.reshape(count, images, tokens * merge**2, -1)


def name_parts(
  vision: Mapping[str, tuple[str, str]], llm: Mapping[str, tuple[str, str]]
) -> dict[str, tuple[str, str]]:
  """Returns the sources of all parameters from those of the tower and the decoder."""
  return {
    **{
      f"vision/{path}": (f"model.visual.{name}", op)
      for path, (name, op) in vision.items()
    },
    **{
      f"llm/{path}": (name.replace("model.", "model.language_model.", 1), op)
      for path, (name, op) in llm.items()
    },
  }


def read_rope_sections(
  config: Mapping[str, Any], default: tuple[int, ...]
) -> tuple[int, ...]:
  """Reads the number of frequencies of each position axis.

  Raises:
    ValueError: They are not those of a head, or positions are scaled.
  """
  text = config["text_config"]
  rope = text["rope_parameters"]
  sections = tuple(rope.get("mrope_section", default))
  head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
  is_default = rope.get("rope_type", "default") in ("default", "mrope")
  if not is_default or 2 * sum(sections) != head:
    raise ValueError(
      "text_config.rope_parameters must have the rope_type 'default' and an "
      f"mrope_section whose sum is half of a head's width, {head}, got {rope}. Give "
      "another checkpoint."
    )
  out = config["vision_config"]["out_hidden_size"]
  if out != text["hidden_size"]:
    raise ValueError(
      f"vision_config.out_hidden_size={out} must be text_config.hidden_size="
      f"{text['hidden_size']}. Give the config of the weights."
    )
  return sections
