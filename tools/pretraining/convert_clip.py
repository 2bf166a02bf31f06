"""CLIP with both its towers: the model, and a published checkpoint into it and back."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8
from transformers import CLIPConfig

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert
from vlmrlaif_jax.huggingface.checkpoint_layouts import HfConfig
from vlmrlaif_jax.huggingface.param_mapping import from_hf
from vlmrlaif_jax.models import clip
from vlmrlaif_jax.models.layers import Dense

# Where each parameter comes from in a Hugging Face checkpoint, see clip.HF_VISION.
HF = {
  **{f"vision/{k}": (f"vision_model.{n}", op) for k, (n, op) in clip.HF_VISION.items()},
  **clip.HF_TEXT,
  "visual_projection/kernel": ("visual_projection.weight", "T"),
  "logit_scale": ("logit_scale", ""),
}


class CLIP(nn.Module):
  """Both towers, and their projections into the space they share."""

  vision: clip.VisionTower
  text: clip.TextTower
  features: int  # Width of the shared space.

  def setup(self):
    types = self.vision.types
    self.visual_projection = Dense(self.features, **types)
    self.text_projection = Dense(self.features, **types)
    # 1 / 0.07, the temperature that CLIP starts from.
    init = nn.initializers.constant(2.6592)
    self.logit_scale = self.param("logit_scale", init, (), jnp.float32)

  def image_features(
    self,
    pixels: Float[Array, "images height width 3"]
    | UInt8[Array, "images height width 3"],
  ) -> Float[Array, "images features"]:
    """Of pixels, raw or normalised; not of unit length."""
    if pixels.dtype == jnp.uint8:
      pixels = self.vision.normalize(pixels)
    return self.visual_projection(self.vision(pixels))

  def text_features(
    self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
  ) -> Float[Array, "batch features"]:
    """Not of unit length."""
    return self.text_projection(self.text(tokens, mask))

  def __call__(
    self,
    pixels: Float[Array, "images height width 3"]
    | UInt8[Array, "images height width 3"],
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
  ) -> Float[Array, "images batch"]:
    """Scaled cosine of every image with every text, in float32."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    images = unit(self.image_features(pixels).astype(jnp.float32))
    texts = unit(self.text_features(tokens, mask).astype(jnp.float32))
    return jnp.exp(self.logit_scale) * images @ texts.T


def load(folder: str | Path) -> tuple[CLIP, Params, HfConfig]:
  """A CLIPModel folder as our model in float32, its "params" and config."""
  folder = Path(folder)
  config = CLIPConfig.from_pretrained(folder).to_dict()
  take = checkpoint_layouts.read_fields
  model = CLIP(
    clip.VisionTower(**take(clip.CONFIG, config["vision_config"])),
    clip.TextTower(**take(clip.TEXT_CONFIG, config["text_config"])),
    config["projection_dim"],
  )
  pixels = jnp.zeros((1, model.vision.image, model.vision.image, 3))
  tokens = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)
  held, _ = checkpoint_layouts.open_tensors(folder, rename=lambda name: name)
  return model, from_hf(HF, held, shapes["params"]), config


def config_of(model: CLIP, *, end: int) -> HfConfig:
  """The config.json of a CLIP that was not loaded from one.

  Args:
    model: the model.
    end: the id that ends a caption, where the text tower is read.
  """
  return {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": model.features,
    "text_config": {
      **checkpoint_layouts.write_fields(clip.TEXT_CONFIG, model.text),
      "model_type": "clip_text_model",
      "eos_token_id": end,
    },
    "vision_config": {
      **checkpoint_layouts.write_fields(clip.CONFIG, model.vision),
      "model_type": "clip_vision_model",
    },
  }


def save(folder: str | Path, params: Params, config: HfConfig, *, dtype: str) -> None:
  """Writes what transformers loads as a CLIPModel; config: as load returns it."""
  convert.save_tensors(Path(folder), HF, params, config, dtype)
