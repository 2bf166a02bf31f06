"""Processor of Qwen3-VL (Bai et al. 2025, 2511.21631).

Two frames form a temporal patch. The text of a video names the time of each temporal
patch before its placeholders. Positions have three axes: time, height and width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vlmrlaif_jax.data.processors.interface import (
  Block,
  Grid,
  ProcessedVideo,
  VideoText,
  Visual,
)
from vlmrlaif_jax.data.video import Reading

FRAMES = 2  # Frames of a temporal patch.
MAX_RATIO = 200  # Greatest ratio of the sides of an image.
DEFAULT_RATE = 24.0  # Frames per second of a video whose file does not state it.

# Settings and their names in the Hugging Face configs of an image or video processor.
# min_pixels and max_pixels may also be size.shortest_edge and size.longest_edge.
_SHARED = {"patch": "patch_size", "merge": "merge_size"}
_CONFIGS = {
  "image": {
    "min_image_pixels": "min_pixels",
    "max_image_pixels": "max_pixels",
    **{name: name for name in ("image_mean", "image_std")},
    **_SHARED,
  },
  "video": {
    **{name: name for name in ("min_pixels", "max_pixels")},
    **{name: name for name in ("fps", "min_frames", "max_frames")},
    **{"mean": "image_mean", "std": "image_std"},
    **_SHARED,
  },
}
# Names with one supported value. 3 is bicubic.
_FIXED = {
  "temporal_patch_size": FRAMES,
  "resample": 3,
  **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
}
# Names that do not change what is processed here.
_UNUSED = {
  *("size", "cap_pixels_per_frame", "max_video_tokens", "do_sample_frames"),
  *("processor_class", "image_processor_type", "video_processor_type"),
  *("return_metadata", "rescale_factor", "data_format", "input_data_format"),
  *("default_to_square", "device"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalPatches:
  """Settings and methods that the processors of Qwen2.5-VL and Qwen3-VL share."""

  patch: int  # Side of a patch, in pixels.
  merge: int = 2  # Side of the squares of patches that become one token.
  fps: float = 2.0  # Frames per second that are read.
  min_frames: int = 4  # Frames that are read at least, if the video has them.
  max_frames: int = 768  # Frames that are read at most.
  # Pixels of a video or of its frames, after they are resized.
  min_pixels: int
  max_pixels: int
  # Pixels of an image, after it is resized.
  min_image_pixels: int
  max_image_pixels: int
  # Mean and standard deviation of pixels of videos, for red, green and blue.
  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_mean: tuple[float, ...]  # Those of images.
  image_std: tuple[float, ...]
  axes: int = 3

  @property
  def resolution(self) -> str:
    """Limits of pixels."""
    return f"{self.min_pixels} to {self.max_pixels} pixels"

  @property
  def layout(self) -> None:
    """None, because each video has its own layout."""

  def process(
    self, frames: UInt8[np.ndarray, "frames height width 3"], grid: Grid
  ) -> ProcessedVideo:
    """Resizes frames to a grid, normalizes them and cuts them into patches.

    Args:
      frames: frames of a video, or one image. The last one is repeated to fill the last
        temporal patch.
      grid: result of `choose_grid` or `fix_grid`.
    """
    is_image = len(frames) == 1
    mean = self.image_mean if is_image else self.mean
    std = self.image_std if is_image else self.std
    return make_patches(frames, grid, self.patch, self.merge, mean, std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLProcessor(TemporalPatches):
  """Settings of the published checkpoints, and the methods of interface.Processor."""

  patch: int = 16  # Side of a patch, in pixels.
  # Pixels of all frames of a video, after they are resized.
  min_pixels: int = 4096
  max_pixels: int = 25_165_824
  # Tokens of a temporal patch at most; 0 for no limit but max_pixels.
  max_frame_tokens: int = 0
  # Pixels of an image, after it is resized.
  min_image_pixels: int = 65_536
  max_image_pixels: int = 16_777_216
  # Mean and standard deviation of pixels of videos, for red, green and blue.
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # Those of images.
  image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

  @classmethod
  def from_config(
    cls, image: Mapping[str, Any], video: Mapping[str, Any], config: Mapping[str, Any]
  ) -> tuple["Qwen3VLProcessor", list[str]]:
    """Returns the processor of a checkpoint, and what it does not support of it.

    Args:
      image: the Hugging Face config of the image processor.
      video: that of the video processor.
      config: the config.json, of which nothing is needed.
    """
    settings, problems = read_settings(image, video)
    if video.get("cap_pixels_per_frame"):
      settings["max_frame_tokens"] = video.get("max_video_tokens", 768)
    return cls(**settings), problems

  @property
  def multiple(self) -> int:
    """Pixels that the sides of a resized frame are multiples of."""
    return self.patch * self.merge

  def make_reading(self, decoder: str) -> Reading:
    """Returns the settings for reading frames by `sample_frames`, in their own size."""
    return Reading(self, decoder=decoder)

  def sample_frames(self, total: int, rate: float | None) -> Int[np.ndarray, " frames"]:
    """Returns evenly spaced indices of frames, `fps` of each second.

    Args:
      total: frames of the video.
      rate: frames per second of the video; None if its file does not state it.
    """
    count = int(total / (rate or DEFAULT_RATE) * self.fps)
    count = min(max(count, self.min_frames), self.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int)

  def choose_grid(self, height: int, width: int, frames: int | None) -> Grid:
    """Returns the grid of a video, or of an image if `frames` is None.

    Args:
      height: height of the frames in pixels, before they are resized.
      width: width of the frames.
      frames: number of frames.

    Raises:
      ValueError: A side is more than 200 times as long as the other.
    """
    if frames is None:
      limits = self.min_image_pixels, self.max_image_pixels
      size = fit_size(height, width, 1, self.multiple, *limits)
      return Grid(1, *(side // self.patch for side in size))
    frames = max(frames, FRAMES)
    # Frames smaller than one token are enlarged first, as in the published processor.
    scale = max(1, self.multiple / height, self.multiple / width)
    height, width = int(height * scale), int(width * scale)
    most = self.max_pixels
    if self.max_frame_tokens:
      limit = min(self.max_frame_tokens * self.multiple**2, most // frames)
      most = max(limit, int(self.min_pixels * 1.05)) * frames
    size = fit_size(height, width, frames, self.multiple, self.min_pixels, most)
    return Grid(-(-frames // FRAMES), *(side // self.patch for side in size))

  def write_text(self, visual: Visual) -> VideoText:
    """Returns the text that stands for an image or a video in a prompt.

    >>> Qwen3VLProcessor().write_text(Visual(Grid(1, 4, 6), seconds=(0.0, 1.0)))[1:-1]
    ['<0.5 seconds><|vision_start|>', 6, '<|vision_end|>']

    The chat template writes <|vision_start|> and <|vision_end|> around a video, too.
    transformers 4 replaced them by the text of temporal patches, and 5.24 leaves them.
    """
    count = visual.grid.height * visual.grid.width // self.merge**2
    text: VideoText = []
    for time in average_times(visual) if visual.seconds else [None]:
      label = "" if time is None else f"<{time:.1f} seconds>"
      text += [f"{label}<|vision_start|>", count, "<|vision_end|>"]
    if visual.seconds:
      text = ["<|vision_start|>", *text, "<|vision_end|>"]
    return text

  def list_blocks(self, visual: Visual) -> list[Block]:
    """Returns the positions of each temporal patch, whose time is always 0.

    The text before a temporal patch states its time.
    """
    height, width = (side // self.merge for side in visual.grid[1:])
    block = np.moveaxis(np.indices((1, height, width)), 0, -1).reshape(-1, 3)
    return [block] * visual.grid.time


def average_times(visual: Visual) -> list[float]:
  """Returns the mean time of the frames of each temporal patch, in seconds."""
  seconds = [*visual.seconds, *visual.seconds[-1:] * (len(visual.seconds) % FRAMES)]
  pairs = zip(seconds[::FRAMES], seconds[1::FRAMES], strict=True)
  return [(first + last) / 2 for first, last in pairs]


def make_patches(
  frames: UInt8[np.ndarray, "frames height width 3"],
  grid: Grid,
  patch: int,
  merge: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> ProcessedVideo:
  """Resizes frames to a grid, normalizes them and cuts them into patches.

  Args:
    frames: frames of a video, or one image. The last one is repeated to fill the last
      temporal patch.
    grid: patches along each axis.
    patch: side of a patch, in pixels.
    merge: see cut_temporal_patches.
    mean: mean of red, green and blue, of pixels from 0 to 1.
    std: standard deviation of red, green and blue.
  """
  size = grid.width * patch, grid.height * patch
  bicubic = Image.Resampling.BICUBIC
  resized = [np.asarray(Image.fromarray(x).resize(size, bicubic)) for x in frames]
  resized += resized[-1:] * (grid.time * FRAMES - len(resized))
  center, scale = (255 * np.array(x, np.float32) for x in (mean, std))
  pixels = (np.stack(resized) - center) / scale
  return ProcessedVideo(cut_temporal_patches(pixels, patch, merge), grid)


def cut_temporal_patches(
  frames: Float[np.ndarray, "frames height width 3"], patch: int, merge: int
) -> Float[np.ndarray, "patches channels"]:
  """Cuts pairs of frames into patches, so that merged patches are neighbors.

  The channels are color, frame, row and column, as in the kernel of a convolution.

  Args:
    frames: frames whose sides are multiples of patch x merge.
    patch: side of a patch, in pixels.
    merge: side of the squares of patches that are merged.
  """
  count, height, width, _ = frames.shape
  rows, columns = height // patch // merge, width // patch // merge
  x = frames.reshape(
    count // FRAMES, FRAMES, rows, merge, patch, columns, merge, patch, 3
  )
  x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
  return np.ascontiguousarray(x).reshape(-1, 3 * FRAMES * patch**2)


def fit_size(
  height: int, width: int, frames: int, multiple: int, least: int, most: int
) -> tuple[int, int]:
  """Returns the height and width to which frames are resized.

  Args:
    height: height in pixels.
    width: width in pixels.
    frames: number of frames; 1 for an image.
    multiple: pixels that both results are multiples of.
    least: pixels of all frames at least.
    most: pixels of all frames at most.

  Raises:
    ValueError: A side is more than 200 times as long as the other.
  """
  if max(height, width) > MAX_RATIO * min(height, width):
    raise ValueError(
      f"frames of {height} x {width} pixels: a side may be at most {MAX_RATIO} times "
      "as long as the other. Crop them."
    )
  sides = [round(side / multiple) * multiple for side in (height, width)]
  # Frames fill temporal patches, but an image counts once.
  counted = 1 if frames == 1 else round(frames / FRAMES) * FRAMES
  pixels = counted * math.prod(sides)
  if pixels > most:
    scale = math.sqrt(frames * height * width / most)
    fit = lambda side: max(multiple, math.floor(side / scale / multiple) * multiple)
  elif pixels < least:
    scale = math.sqrt(least / (frames * height * width))
    fit = lambda side: math.ceil(side * scale / multiple) * multiple
  else:
    return sides[0], sides[1]
  return fit(height), fit(width)


def read_settings(
  image: Mapping[str, Any], video: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Reads the settings of a processor, and a line for each key that is not supported.

  Settings that the configs do not name are left out.

  Args:
    image: the Hugging Face config of the image processor.
    video: that of the video processor.
  """
  settings: dict[str, Any] = {}
  problems = []
  for kind, config in (("image", image), ("video", video)):
    size = config.get("size") or {}
    values = {
      "min_pixels": size.get("shortest_edge"),
      "max_pixels": size.get("longest_edge"),
      **{name: value for name, value in config.items() if value is not None},
    }
    names = _CONFIGS[kind]
    for setting, name in names.items():
      if (value := values.get(name)) is None:
        continue
      if isinstance(value, list):
        value = tuple(value)
      elif name == "fps":
        value = float(value)
      if settings.setdefault(setting, value) != value:
        problems.append(
          f"{name} of the {kind} processor must be {settings[setting]}, as of the "
          f"image processor, not {value}"
        )
    for name, value in values.items():
      if name in _FIXED and value != _FIXED[name]:
        problems.append(
          f"{name} of the {kind} processor must be {_FIXED[name]}, not {value}"
        )
      elif name not in _UNUSED | _FIXED.keys() | set(names.values()) and value:
        problems.append(f"{name}={value} of the {kind} processor is not supported")
  return settings, problems
