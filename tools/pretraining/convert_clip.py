"""CLIP with both towers: the model, and checkpoint conversion in both directions."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8
from transformers import CLIPConfig

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.huggingface import convert, published_names
from vlmrlaif_jax.huggingface.checkpoint_layouts import HfConfig
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import clip, clip_text, layers
from vlmrlaif_jax.models.layers import Dense

# Source of each parameter in a Hugging Face checkpoint; see clip.HF_VISION.
HF = {
  **{f"vision/{k}": (f"vision_model.{n}", op) for k, (n, op) in clip.HF_VISION.items()},
  **clip_text.HF_TEXT,
  "visual_projection/kernel": ("visual_projection.weight", "T"),
  "logit_scale": ("logit_scale", ""),
}


class CLIP(nn.Module):
  """Both towers, and their projections into a shared space."""

  vision: clip.VisionTower
  text: clip_text.TextTower
  features: int  # Width of the shared space.

  def setup(self):
    """Creates the towers and their projections."""
    types = self.vision.types
    self.visual_projection = Dense(self.features, **types)
    self.text_projection = Dense(self.features, **types)
    # exp(2.6592) is 1 / 0.07, CLIP's initial temperature.
    init = nn.initializers.constant(2.6592)
    self.logit_scale = self.param("logit_scale", init, (), jnp.float32)

  def image_features(
    self,
    pixels: Float[Array, "images height width 3"]
    | UInt8[Array, "images height width 3"],
  ) -> Float[Array, "images features"]:
    """Returns features of raw or normalized pixels, not scaled to unit length."""
    if pixels.dtype == jnp.uint8:
      pixels = self.vision.normalize(pixels)
    return self.visual_projection(self.vision(pixels))

  def text_features(
    self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
  ) -> Float[Array, "batch features"]:
    """Returns features of captions, not scaled to unit length."""
    return self.text_projection(self.text(tokens, mask))

  def __call__(
    self,
    pixels: Float[Array, "images height width 3"]
    | UInt8[Array, "images height width 3"],
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
  ) -> Float[Array, "images batch"]:
    """Computes the scaled cosine of every image with every text, in float32."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    images = unit(self.image_features(pixels).astype(jnp.float32))
    texts = unit(self.text_features(tokens, mask).astype(jnp.float32))
    return jnp.exp(self.logit_scale) * images @ texts.T


def load(folder: str | Path) -> tuple[CLIP, Params, HfConfig]:
  """Loads a CLIPModel folder.

  Returns:
    (model in float32, its "params", its config.json).
  """
  folder = Path(folder)
  config = CLIPConfig.from_pretrained(folder).to_dict()
  take = layers.read_fields
  model = CLIP(
    clip.VisionTower(**take(clip.CONFIG, config["vision_config"])),
    clip_text.TextTower(**take(clip_text.TEXT_CONFIG, config["text_config"])),
    config["projection_dim"],
  )
  pixels = jnp.zeros((1, model.vision.image, model.vision.image, 3))
  tokens = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)
  tensors, _ = published_names.open_tensors(folder, rename=lambda name: name)
  return model, convert_from_hf(HF, tensors, shapes["params"]), config


def make_config(model: CLIP, *, end: int) -> HfConfig:
  """Returns the config.json of a CLIP that was not loaded from a checkpoint.

  Args:
    model: The model.
    end: Id of the token that ends a caption; the text features come from its position.
  """
  return {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": model.features,
    "text_config": {
      **layers.write_fields(clip_text.TEXT_CONFIG, model.text),
      "model_type": "clip_text_model",
      "eos_token_id": end,
    },
    "vision_config": {
      **layers.write_fields(clip.CONFIG, model.vision),
      "model_type": "clip_vision_model",
    },
  }


def save(folder: str | Path, params: Params, config: HfConfig, *, dtype: str) -> None:
  """Writes a folder that transformers loads as a CLIPModel.

  Args:
    folder: The folder.
    params: The "params" of the model.
    config: The config.json, see `load` and `make_config`.
    dtype: Type of the written weights, such as "float16".
  """
  convert.save_tensors(Path(folder), HF, params, config, dtype)
