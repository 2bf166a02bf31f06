"""Base classes of the vision towers of Qwen2.5-VL and Qwen3-VL.

A subclass of StateMergers merges hidden states. A tower is a subclass of it and of
TemporalTower, with the layers.
"""

import abc
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmrlaif_jax.models.layers import Layer, VisualFeatures, describe_settings
from vlmrlaif_jax.models.ops.patch_grids import join_states, split_states

PATCH_FRAMES = 2  # Frames of a temporal patch.


class StateMergers(Layer, abc.ABC, kw_only=True):
  """The part of Qwen's towers that computes features of hidden states."""

  out: int  # Width of the features, which is that of the language model.
  taps: tuple[int, ...] = ()  # Layers whose hidden states become DeepStack features.
  merge: int = 2  # Side of the squares of patches that are merged.
  eps: float = 1e-6  # Epsilon of norms.

  @abc.abstractmethod
  def merge_patches(
    self, states: Float[Array, "states images patches embed"]
  ) -> VisualFeatures:
    """Computes the features of hidden states by `TemporalTower.encode`."""

  def connect(self, features: Float[Array, "batch tokens features"]) -> VisualFeatures:
    """Computes the features of hidden states that `join_states` joined."""
    return self.merge_patches(split_states(features, 1 + len(self.taps), self.merge))


class TemporalTower(StateMergers, kw_only=True):
  """A vision tower of Qwen, which returns features of temporal patches."""

  embed: int  # Width of hidden states.
  patch: int  # Side of a patch, in pixels.
  merges: bool = True  # Whether the tower has the mergers, and not the projector.

  @abc.abstractmethod
  def encode(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "states images patches embed"]:
    """Computes the hidden states of patches after the tapped layers and the last one.

    Args:
      pixels: normalized pixels of the patches of each temporal patch, in the order of
        order_patches. The channels are those of cut_temporal_patches of the processor.
      grid: rows and columns of patches.
    """

  def __call__(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> VisualFeatures:
    """Computes the features of temporal patches, or their hidden states, joined."""
    states = self.encode(pixels, grid)
    if self.merges:
      return self.merge_patches(states)
    return VisualFeatures(join_states(states, self.merge))

  @property
  def feature_shape(self) -> tuple[int, ...]:
    """Shape of the features of a token."""
    width = self.out if self.merges else self.merge**2 * self.embed
    return ((1 + len(self.taps)) * width,)

  def settings(self) -> dict[str, Any]:
    """Returns the settings that features depend on."""
    return describe_settings(self)

  def example_inputs(self) -> tuple[Any, ...]:
    """Returns inputs by which the tower is initialized."""
    pixels = jnp.zeros((1, self.merge**2, 3 * PATCH_FRAMES * self.patch**2))
    return pixels, (self.merge, self.merge)

  def features(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "images tokens features"]:
    """Computes the features of temporal patches, joined in one array; see Connector."""
    merged, deepstack = self(pixels, grid)
    more = () if deepstack is None else deepstack
    return jnp.concatenate([merged, *more], axis=-1)
