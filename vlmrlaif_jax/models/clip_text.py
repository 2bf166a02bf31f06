"""Text tower and text encoder of CLIP (Radford et al. 2021, 2103.00020)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.models.clip import (
  BLOCKS_HF,
  TOWER_CONFIG,
  Tower,
  layer_norm,
  run_blocks,
)
from vlmrlaif_jax.models.layers import Dense, Layer

# Names of the fields of TextTower in "text_config" of a Hugging Face config.json.
TEXT_CONFIG = {
  "vocab": "vocab_size",
  "context": "max_position_embeddings",
  **TOWER_CONFIG,
}

_HF_TEXT_TOWER = {
  "token_embedding/embedding": ("embeddings.token_embedding.weight", ""),
  "position_embedding": ("embeddings.position_embedding.weight", ""),
  **BLOCKS_HF,
  "final_norm/scale": ("final_layer_norm.weight", ""),
  "final_norm/bias": ("final_layer_norm.bias", ""),
}
# Sources of the parameters of TextEncoder in a Hugging Face checkpoint.
HF_TEXT = {
  **{f"text/{k}": (f"text_model.{n}", op) for k, (n, op) in _HF_TEXT_TOWER.items()},
  "text_projection/kernel": ("text_projection.weight", "T"),
}


class TextTower(Tower, kw_only=True):
  """A text tower that returns the hidden state of a caption's end token."""

  vocab: int  # Rows of the embedding matrix.
  context: int  # Maximum length of a caption, in tokens.

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
  ) -> Float[Array, "batch embed"]:
    """Computes the hidden state of the end token, which has the highest id."""
    init = nn.initializers.normal(0.02)
    time = tokens.shape[1]
    if time > self.context:
      raise ValueError(f"captions must have at most {self.context} tokens, not {time}")
    positions = self.param(
      "position_embedding", init, (self.context, self.embed), self.param_dtype
    )
    x = nn.Embed(
      self.vocab, self.embed, embedding_init=init, name="token_embedding", **self.types
    )(tokens)
    x = x + positions[:time].astype(x.dtype)
    attention = jnp.tri(time, dtype=bool) & mask[:, None, :]
    x = run_blocks(self.block("blocks"), x, self.layers, attention)
    end = jnp.argmax(tokens, axis=1)
    last = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return layer_norm(self.eps, name="final_norm", **self.types)(last)


class TextEncoder(Layer):
  """A text encoder that returns unit vectors.

  It is CLIPTextModelWithProjection of transformers, scaled to unit length.
  """

  text: TextTower
  features: int  # Dimensions of the vectors.

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
  ) -> Float[Array, "batch features"]:
    project = Dense(self.features, name="text_projection", **self.types)
    x = project(self.text(tokens, mask)).astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
