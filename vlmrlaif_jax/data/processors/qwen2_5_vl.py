"""Processor of Qwen2.5-VL (Bai et al. 2025, 2502.13923).

As in qwen3_vl.py, two frames form a temporal patch, but the text of a video is one run
of placeholders, and the positions on the time axis are proportional to time.
"""

import dataclasses
import math
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

_USED = 0.9  # Share of max_video_tokens that is used.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen25VLProcessor(TemporalPatches):
  """Settings of the published checkpoints, and the methods of interface.Processor."""

  patch: int = 14  # Side of a patch, in pixels.
  # Pixels of a frame of a video, after it is resized.
  min_pixels: int = 3136
  max_pixels: int = 12_845_056
  # Tokens of a video, which limit the pixels of its frames; 0 for no limit. Like the
  # reference implementation, whose setting is 128,000, 90 % of them are used.
  max_video_tokens: int = 0
  # Pixels of an image, after it is resized.
  min_image_pixels: int = 3136
  max_image_pixels: int = 12_845_056
  # Positions of a second on the time axis. It is "vision_config.tokens_per_second" of a
  # Hugging Face config.json.
  tokens_per_second: int = 2
  # CLIP's mean and standard deviation of pixels, for red, green and blue.
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # For images.
  image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

  @classmethod
  def from_config(
    cls, image: Mapping[str, Any], video: Mapping[str, Any], config: Mapping[str, Any]
  ) -> tuple["Qwen25VLProcessor", list[str]]:
    """Returns the processor of a checkpoint, and what it does not support of it.

    Args:
      image: the Hugging Face config of the image processor.
      video: that of the video processor, which may be the same.
      config: the config.json.
    """
    settings, problems = read_settings(image, video)
    if video.get("cap_pixels_per_frame"):
      settings["max_video_tokens"] = video.get("max_video_tokens", 128_000)
    speed = config["vision_config"]["tokens_per_second"]
    return cls(**settings, tokens_per_second=speed), problems

  def sample_frames(self, total: int, rate: float | None) -> Int[np.ndarray, " frames"]:
    """Returns indices of frames from the first on, `fps` of each second.

    Their number is even, unless the video has one frame.

    Args:
      total: frames of the video.
      rate: frames per second of the video; None if its file does not state it.
    """
    even = lambda count: math.floor(count / FRAMES) * FRAMES
    most = even(min(self.max_frames, total))
    wanted = max(total / (rate or DEFAULT_RATE) * self.fps, self.min_frames)
    count = max(1, even(min(wanted, most)))
    # In float32, as in transformers, which decides what is rounded down.
    return (np.arange(count) * (total / count)).astype(np.float32).astype(int)

  def fit_video(self, height: int, width: int, frames: int) -> tuple[int, int]:
    """Returns the height and width to which a number of frames are resized."""
    most = self._limit_frame(frames)
    return fit_size(height, width, 1, self.multiple, self.min_pixels, most)

  def _limit_frame(self, frames: int) -> int:
    """Returns the most pixels of each of a number of frames."""
    if not self.max_video_tokens:
      return self.max_pixels
    total = int(self.max_video_tokens * self.multiple**2 * _USED)
    return max(min(self.max_pixels, total * FRAMES // frames), self.least_frame)

  @property
  def frame_limits(self) -> tuple[int, int]:
    """The least and most pixels of a frame of a video with `max_frames` frames."""
    return self.min_pixels, self._limit_frame(self.counted_frames)

  @property
  def least_frame(self) -> int:
    """Pixels that each frame has in spite of `limit_pixels`."""
    return int(self.min_pixels * 1.05)

  def limit_pixels(self, max_pixels: int) -> "Qwen25VLProcessor":
    """Returns the processor with a limit of the pixels of all frames of a video."""
    tokens = int(max_pixels / FRAMES / self.multiple**2 / _USED)
    return dataclasses.replace(self, max_video_tokens=tokens)

  def write_limits(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of `limit`, and the tokens of a video if limited."""
    image, video = super().write_limits()
    if self.max_video_tokens:
      video |= dict(cap_pixels_per_frame=True, max_video_tokens=self.max_video_tokens)
    return image, video

  def write_text(self, visual: Visual) -> VideoText:
    """Returns the text that stands for an image or a video in a prompt.

    >>> from vlmrlaif_jax.data.processors.interface import Grid
    >>> Qwen25VLProcessor().write_text(Visual(Grid(2, 4, 6)))
    ['<|vision_start|>', 12, '<|vision_end|>']
    """
    count = math.prod(visual.grid) // self.merge**2
    return ["<|vision_start|>", count, "<|vision_end|>"]

  def list_blocks(self, visual: Visual) -> list[Block]:
    """Returns the positions of an image or a video.

    What follows continues after the greatest position, as in the code of the paper.
    transformers 5.24 continues after the height or the width of a video, so that text
    has positions that the end of the video has too.
    """
    time, *sides = visual.grid
    cells = np.indices((time, *(side // self.merge for side in sides)), np.int32)
    if visual.rate:
      step = np.float32(self.tokens_per_second) * np.float32(FRAMES / visual.rate)
      cells[0] = np.floor(cells[0].astype(np.float32) * step)
    return [np.moveaxis(cells, 0, -1).reshape(-1, 3)]
