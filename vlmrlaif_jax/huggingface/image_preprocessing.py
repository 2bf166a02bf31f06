"""Reads the image preprocessing of a checkpoint or of a vision tower."""

import math
from pathlib import Path
from typing import NamedTuple

from vlmrlaif_jax.huggingface.config_keys import HfConfig, read_json_object
from vlmrlaif_jax.models import clip


class PixelScale(NamedTuple):
  """Mean and standard deviation of pixels from 0 to 1, for red, green and blue."""

  mean: tuple[float, ...]
  std: tuple[float, ...]


_USUAL = (PixelScale(clip.MEAN, clip.STD), PixelScale((0.5,) * 3, (0.5,) * 3))


def read_preprocessing(
  folder: Path, image_size: int
) -> tuple[PixelScale | None, list[str]]:
  """Reads the image preprocessing of a folder.

  Mean and standard deviation are used. Frames are always padded to a square and resized
  with bicubic interpolation; other settings are described in notes.

  Args:
    folder: Folder of a LLaVA or of a vision tower.
    image_size: Side of the tower's images, in pixels.

  Returns:
    The scale of pixels, or None if the folder has none, and the notes.

  Raises:
    ValueError: A setting is invalid, or pixels are not scaled to 0..1.
  """
  path = folder / "preprocessor_config.json"
  if path.exists():
    config = read_json_object(path)
  elif (path := folder / "processor_config.json").exists():
    config = read_json_object(path).get("image_processor") or {}
  else:
    return None, []
  if not isinstance(config, dict):
    raise ValueError(f"{path}: image_processor must be an object. Download it again.")
  factor = config.get("rescale_factor", 1 / 255)
  is_factor = isinstance(factor, int | float) and abs(factor * 255 - 1) < 1e-3
  if not config.get("do_rescale", True) or not is_factor:
    raise ValueError(
      f"{path}: do_rescale must be true and rescale_factor 1/255, got "
      f"do_rescale={config.get('do_rescale', True)!r}, rescale_factor={factor!r}. "
      "Give another checkpoint."
    )
  scale = None
  if not config.get("do_normalize", True):
    scale = PixelScale((0.0,) * 3, (1.0,) * 3)
  elif "image_mean" in config or "image_std" in config:
    scale = PixelScale(*(_read_pixels(path, config, k) for k in PixelScale._fields))
  notes = []
  if scale is not None and scale not in _USUAL:
    values = f"image_mean={list(scale.mean)} and image_std={list(scale.std)}"
    notes.append(f"{path.name}: frames are normalized by {values}")
  if unused := _list_unused(config, image_size):
    notes.append(
      f"{path.name}: not used, because frames are padded to a square of {image_size} "
      f"pixels: {', '.join(unused)}"
    )
  return scale, notes


def _read_pixels(path: Path, config: HfConfig, name: str) -> tuple[float, ...]:
  values = config.get(f"image_{name}")
  if (
    not isinstance(values, list)
    or len(values) != 3
    or not all(isinstance(x, int | float) and math.isfinite(x) for x in values)
    or (name == "std" and min(values) <= 0)
  ):
    raise ValueError(
      f"{path}: image_{name} must be three numbers, got {values!r}. Download it again."
    )
  return tuple(float(x) for x in values)


def _list_unused(config: HfConfig, image_size: int) -> list[str]:
  """Lists settings of image preprocessing that differ from what is done."""
  unused = []
  if config.get("do_center_crop"):
    unused.append("do_center_crop=True")
  if not config.get("do_resize", True):
    unused.append("do_resize=False")
  if config.get("resample", 3) != 3:
    unused.append(f"resample={config['resample']!r}")
  size = config.get("crop_size" if config.get("do_center_crop") else "size", image_size)
  sides = size.values() if isinstance(size, dict) else [size]
  if any(side != image_size for side in sides):
    unused.append(f"size={size!r}")
  return unused
