"""SigLIP's vision tower (Zhai et al. 2023, 2303.15343): a ViT without a class token."""

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from vlmrlaif_jax.models import clip
from vlmrlaif_jax.models.layers import Dense, DTypes

VARIANTS: dict[str, clip.Shape] = {
  # As in so400m_384, the patches leave a rim of the image out.
  "tiny": dict(image=18, patch=4, embed=32, mlp=64, layers=3, heads=4),
  "base_224": dict(image=224, patch=16, embed=768, mlp=3072, layers=12, heads=12),
  "so400m_384": dict(image=384, patch=14, embed=1152, mlp=4304, layers=27, heads=16),
}

CONFIG = clip.CONFIG

SHARDING = ((r"patch/bias", P("tensor")), *clip.SHARDING)

# See clip.HF_VISION. Whole checkpoints hold "head." too, which pools; it is not here.
HF_VISION = {
  **{
    path: place
    for path, place in clip.HF_VISION.items()
    if not path.startswith(("class_embedding", "pre_norm"))
  },
  "patch/bias": ("embeddings.patch_embedding.bias", ""),
}


class Model(nn.Module):
  """Images in, features of their patches out."""

  image: int  # Side of the square image, in pixels.
  patch: int
  embed: int
  mlp: int
  layers: int
  heads: int
  activation: str = "gelu_pytorch_tanh"
  eps: float = 1e-6
  select_layer: int = -2  # Which of the layers + 1 hidden states patches come from.
  dtype: DTypeLike = "float32"
  param_dtype: DTypeLike = "float32"

  def setup(self):
    types = DTypes(dtype=self.dtype, param_dtype=self.param_dtype)
    init = nn.initializers.normal(0.02)
    self.patch_kernel = Dense(self.embed, bias=True, **types, name="patch")
    self.position_embedding = self.param(
      "position_embedding",
      init,
      ((self.image // self.patch) ** 2, self.embed),
      self.param_dtype,
    )
    self.blocks = clip.Block(self.heads, self.mlp, self.activation, self.eps, **types)
    self.post_norm = clip.layer_norm(self.eps, **types, name="post_norm")

  def normalise(
    self, frames: UInt8[Array, "*batch height width 3"]
  ) -> Float[Array, "*batch height width 3"]:
    """Pixels 0..255 in the range that SigLIP was trained on, -1..1, in float32."""
    return frames.astype(jnp.float32) / 127.5 - 1

  def _embed(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch patches embed"]:
    x = self.patch_kernel(clip.cut_patches(pixels, self.image, self.patch))
    return x + self.position_embedding.astype(x.dtype)

  def __call__(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch patches embed"]:
    """The last hidden state of normalised pixels, after the last norm."""
    x, _ = nn.scan(
      lambda block, x: (block(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
    )(self.blocks, self._embed(pixels))
    return self.post_norm(x)

  def patches(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch patches embed"]:
    """The selected hidden state; runs no layer beyond it."""
    selected = self.select_layer % (self.layers + 1)
    return clip.run_blocks(self.blocks, self._embed(pixels), selected)
