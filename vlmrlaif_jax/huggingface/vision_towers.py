"""Opens the folder of a CLIP or SigLIP as the vision tower of a LLaVA."""

import re
from pathlib import Path

import numpy as np
from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from vlmrlaif_jax.huggingface import config_keys, published_names
from vlmrlaif_jax.huggingface.config_keys import HfConfig
from vlmrlaif_jax.huggingface.image_preprocessing import (
  PixelScale,
  read_preprocessing,
)
from vlmrlaif_jax.huggingface.tensor_files import Tensor

# Model type of a tower's folder, which may contain a text tower too -> config class.
_CONFIGS: dict[str, type[PreTrainedConfig]] = {
  "clip": CLIPVisionConfig,
  "clip_vision_model": CLIPVisionConfig,
  "siglip": SiglipVisionConfig,
  "siglip_vision_model": SiglipVisionConfig,
}
# Name of a tower on the Hub -> its key in clip.VARIANTS.
VARIANTS = {
  "clip-vit-large-patch14-336": "l14_336",
  "clip-vit-large-patch14": "l14",
  "clip-vit-base-patch32": "b32",
}


def read_tower_config(folder: Path) -> tuple[HfConfig, PixelScale | None, list[str]]:
  """Reads the config of a vision tower.

  Returns:
    The config, the scale of pixels if the folder has one, and notes about settings
    that are not used.

  Raises:
    ValueError: The folder contains another model.
  """
  path = folder / "config.json"
  raw = config_keys.read_json_object(path)
  model_type = raw.get("model_type")
  if model_type not in _CONFIGS:
    raise ValueError(
      f"the model_type of the vision tower {folder} must be one of "
      f"{sorted(_CONFIGS)}, got {model_type!r}"
    )
  if model_type in ("clip", "siglip"):  # Both towers: the config is one level below.
    raw = raw.get("vision_config") or {}
    if not isinstance(raw, dict):
      raise ValueError(f"{path}: vision_config must be an object. Download it again.")
  config = config_keys.make_config(_CONFIGS[model_type], raw, path)
  unused = config_keys.check_keys(path, raw, _CONFIGS[model_type])
  notes = [f"{folder.name}/{n}" for n in config_keys.describe_unused(path, unused)]
  size = config["image_size"]
  scale, image_notes = read_preprocessing(folder, size)
  return config, scale, [*notes, *image_notes]


def open_tower(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
  """Opens the tensors of a vision tower; also returns notes about unused ones."""
  rename = lambda name: re.sub(r"^(vision_model\.)?", "vision_model.", name)
  tensors, notes = published_names.open_tensors(folder, rename=lambda name: name)
  tensors, more = published_names.drop_unused(
    published_names.NOT_TOWER, folder, tensors
  )
  return {f"vision_tower.{rename(n)}": x for n, x in tensors.items()}, (*notes, *more)


def make_random_projector(config: HfConfig) -> dict[str, np.ndarray]:
  """Samples weights that preserve the variance of activations; biases are 0."""
  channels = config["vision_config"]["hidden_size"]
  embed = config["text_config"]["hidden_size"]
  rng, params = np.random.default_rng(0), {}
  for layer, inputs in (("linear_1", channels), ("linear_2", embed)):
    name = f"multi_modal_projector.{layer}"
    weight = rng.normal(scale=inputs**-0.5, size=(embed, inputs))
    params[f"{name}.weight"] = weight.astype(np.float32)
    params[f"{name}.bias"] = np.zeros(embed, np.float32)
  return params
