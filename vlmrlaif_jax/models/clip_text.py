"""CLIP's text tower alone: what compares captions with captions.

It equals transformers' CLIPTextModelWithProjection, scaled to unit length.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.models import clip
from vlmrlaif_jax.models.layers import Dense

# What the fields of clip.TextTower are called in a Hugging Face config.json.
CONFIG = {
  "vocab": "vocab_size",
  "context": "max_position_embeddings",
  **{f: theirs for f, theirs in clip.CONFIG.items() if f not in ("image", "patch")},
}
HF = {path: at for path, at in clip.HF.items() if path.startswith(("text/", "text_"))}


class TextEncoder(nn.Module):
  """Captions in, unit vectors out: their dot product is the cosine."""

  text: clip.TextTower
  features: int  # Length of a vector.
  dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
  ) -> Float[Array, "batch features"]:
    project = functools.partial(Dense, dtype=self.dtype, param_dtype=self.dtype)
    x = project(self.features, name="text_projection")(self.text(tokens, mask))
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
