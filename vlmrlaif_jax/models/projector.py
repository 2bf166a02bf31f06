"""From vision features to the language model's embeddings: an MLP, and pooling."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vlmrlaif_jax.models.layers import Dense, Layer
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
  """An MLP over each patch: LLaVA-1.5's (Liu et al. 2023, 2310.03744) at depth 2."""

  embed: int
  activation: str = "gelu"
  depth: int = 2

  @nn.compact
  def __call__(
    self, features: Float[Array, "*batch channels"]
  ) -> Float[Array, "*batch embed"]:
    x = features
    for i in range(self.depth):
      x = PROJECTOR_ACTIVATIONS[self.activation](x) if i else x
      layer = Dense(self.embed, bias=True, name=f"linear_{i + 1}", **self.types)
      # Or a gradient would take all rows to where its part of the matrix is.
      x = constrain(layer(x), BATCH_AXES)
    return x


def pool_video(
  features: Float[Array, "*batch frames patches embed"],
) -> Float[Array, "*batch tokens embed"]:
  """Spatio-temporal pooling: what each frame shows, then what each place shows.

  Maaz et al. 2023 (2306.05424): the mean over patches of every frame, followed by
  the mean over frames of every patch. It comes after the projector, which is not
  linear: pooling first would give other tokens. A single frame is left as it is.
  """
  if features.shape[-3] == 1:
    return features[..., 0, :, :]
  mean = functools.partial(jnp.mean, dtype=jnp.float32)
  frames, places = mean(features, axis=-2), mean(features, axis=-3)
  return jnp.concatenate([frames, places], axis=-2).astype(features.dtype)


def count_pooled_tokens(frames: int, patches: int) -> int:
  """How many tokens `pool` makes of a video."""
  return patches if frames == 1 else frames + patches
