"""CLIP with both its towers: a published checkpoint into our model and back."""

from pathlib import Path

import jax
import jax.numpy as jnp
from transformers import CLIPConfig

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert
from vlmrlaif_jax.huggingface.checkpoint_layouts import Config
from vlmrlaif_jax.huggingface.param_mapping import from_hf
from vlmrlaif_jax.models import clip, clip_text


def load(folder: str | Path) -> tuple[clip.CLIP, Params, Config]:
  """A CLIPModel folder as our model in float32, its "params" and config."""
  folder = Path(folder)
  config = CLIPConfig.from_pretrained(folder).to_dict()
  take = checkpoint_layouts.take
  model = clip.CLIP(
    clip.VisionTower(**take(clip.CONFIG, config["vision_config"])),
    clip.TextTower(**take(clip_text.CONFIG, config["text_config"])),
    config["projection_dim"],
  )
  pixels = jnp.zeros((1, model.vision.image, model.vision.image, 3))
  tokens = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)
  held, _ = checkpoint_layouts.opened(folder, rename=lambda name: name)
  return model, from_hf(clip.HF, held, shapes["params"]), config


def config_of(model: clip.CLIP, *, end: int) -> Config:
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
      **checkpoint_layouts.give(clip_text.CONFIG, model.text),
      "model_type": "clip_text_model",
      "eos_token_id": end,
    },
    "vision_config": {
      **checkpoint_layouts.give(clip.CONFIG, model.vision),
      "model_type": "clip_vision_model",
    },
  }


def save(folder: str | Path, params: Params, config: Config, *, dtype: str) -> None:
  """Writes what transformers loads as a CLIPModel; config: as load returns it."""
  convert.save(Path(folder), clip.HF, params, config, dtype)
