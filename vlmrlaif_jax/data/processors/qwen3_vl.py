"""Processor of Qwen3-VL (Bai et al. 2025, 2511.21631).

Two frames form a temporal patch. The text of a video names the time of each temporal
patch before its placeholders. Positions have three axes: time, height and width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from vlmrlaif_jax.data.processors.interface import Block, VideoText, Visual
from vlmrlaif_jax.data.processors.sizes import FRAMES, fit_size
from vlmrlaif_jax.data.processors.temporal_patches import (
  DEFAULT_RATE,
  TemporalPatches,
  read_settings,
)


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

  def sample_frames(self, total: int, rate: float | None) -> Int[np.ndarray, " frames"]:
    """Returns evenly spaced indices of frames, `fps` of each second.

    Args:
      total: frames of the video.
      rate: frames per second of the video; None if its file does not state it.
    """
    count = int(total / (rate or DEFAULT_RATE) * self.fps)
    count = min(max(count, self.min_frames), self.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int)

  def fit_video(self, height: int, width: int, frames: int) -> tuple[int, int]:
    """Returns the height and width to which a number of frames are resized."""
    frames = max(frames, FRAMES)
    # Frames smaller than one token are enlarged first, as in the published processor.
    scale = max(1, self.multiple / height, self.multiple / width)
    height, width = int(height * scale), int(width * scale)
    most = self.max_pixels
    if self.max_frame_tokens:
      most = self._limit_frame(frames) * frames
    return fit_size(height, width, frames, self.multiple, self.min_pixels, most)

  def _limit_frame(self, frames: int) -> int:
    """Returns the most pixels of each of a number of frames."""
    most = self.max_pixels // frames
    if not self.max_frame_tokens:
      return most
    return max(min(self.max_frame_tokens * self.multiple**2, most), self.least_frame)

  @property
  def frame_limits(self) -> tuple[int, int]:
    """The least and most pixels of a frame of a video with `max_frames` frames."""
    most = self._limit_frame(self.counted_frames)
    return min(self.min_pixels // FRAMES, most), most

  @property
  def least_frame(self) -> int:
    """Pixels that each frame has in spite of `limit_pixels`."""
    return int(self.min_pixels * 1.05) if self.max_frame_tokens else self.multiple**2

  def limit_pixels(self, max_pixels: int) -> "Qwen3VLProcessor":
    """Returns the processor with a limit of the pixels of all frames of a video."""
    least = min(self.min_pixels, max_pixels)
    return dataclasses.replace(self, min_pixels=least, max_pixels=max_pixels)

  def write_text(self, visual: Visual) -> VideoText:
    """Returns the text that stands for an image or a video in a prompt.

    >>> from vlmrlaif_jax.data.processors.interface import Grid
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
