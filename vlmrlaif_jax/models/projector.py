"""Projector: an MLP from vision features to embeddings, and pooling over a video."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vlmrlaif_jax.models.layers import Dense, Layer, VisualFeatures
from vlmrlaif_jax.models.ops.activation_sharding import BATCH_AXES, constrain

SHARDING = ((r"linear_\d+/kernel", P("fsdp", "tensor")), (r"linear_\d+/bias", P()))

HF = {
  f"linear_{i}/{leaf}": (f"linear_{i}.{name}", op)
  for i in (1, 2)
  for leaf, name, op in (("kernel", "weight", "T"), ("bias", "bias", ""))
}

PROJECTOR_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "relu": nn.relu,
}


class Projector(Layer):
  """An MLP over each patch; depth 2 is LLaVA-1.5 (Liu et al. 2023, 2310.03744)."""

  embed: int  # Width of the language model's embeddings.
  activation: str = "gelu"  # A key of PROJECTOR_ACTIVATIONS.
  depth: int = 2  # Number of linear layers.

  @nn.compact
  def __call__(
    self, features: Float[Array, "*batch channels"]
  ) -> Float[Array, "*batch embed"]:
    x = features
    for i in range(self.depth):
      x = PROJECTOR_ACTIVATIONS[self.activation](x) if i else x
      layer = Dense(self.embed, bias=True, name=f"linear_{i + 1}", **self.types)
      # Without it, XLA gathers all rows on each shard of a gradient.
      x = constrain(layer(x), BATCH_AXES)
    return x

  def connect(
    self, features: Float[Array, "batch frames patches channels"]
  ) -> VisualFeatures:
    """Projects and pools the features of videos."""
    return VisualFeatures(pool_video(self(features)))


class Connector(nn.Module):
  """The projector of a tower whose features have the language model's width."""

  embed: int  # Width of the language model's embeddings.

  def connect(self, features: Float[Array, "batch tokens features"]) -> VisualFeatures:
    """Splits joined features into those that replace embeddings, and DeepStack's."""
    merged, *deepstack = jnp.split(features, features.shape[-1] // self.embed, axis=-1)
    return VisualFeatures(merged, jnp.stack(deepstack) if deepstack else None)


def pool_video(
  features: Float[Array, "*batch frames patches embed"],
) -> Float[Array, "*batch tokens embed"]:
  """Pools a video over space and over time: Maaz et al. 2023 (2306.05424), section 3.1.

  The result is the mean over patches of every frame, then the mean over frames of every
  patch. It follows the projector, which is not linear, so the order matters. A single
  frame is not pooled.

  >>> pool_video(jnp.zeros((8, 16, 4))).shape
  (24, 4)
  """
  if features.shape[-3] == 1:
    return features[..., 0, :, :]
  mean = functools.partial(jnp.mean, dtype=jnp.float32)
  frames, places = mean(features, axis=-2), mean(features, axis=-3)
  return jnp.concatenate([frames, places], axis=-2).astype(features.dtype)
