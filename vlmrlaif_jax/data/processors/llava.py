"""Processor of LLaVA-1.5 with pooled videos (Maaz et al. 2023, 2306.05424).

Frames are squares of one size. A video is one run of placeholders and a newline, and
its positions are those of text.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vlmrlaif_jax.data.decoding.sampling import ByCount
from vlmrlaif_jax.data.decoding.squares import FILL
from vlmrlaif_jax.data.processors.interface import (
  NO_VIDEO,
  Block,
  Grid,
  ProcessedVideo,
  VideoText,
  VideoTokens,
  Visual,
)
from vlmrlaif_jax.data.video import Reading


@dataclasses.dataclass(frozen=True)
class LlavaProcessor:
  """Settings of a checkpoint, and the methods of interface.Processor."""

  frames: int  # Frames that are read of each video.
  image: int  # Height and width of a frame in pixels, after it is resized.
  patch: int  # Side of a patch, in pixels.
  fill: tuple[int, ...] = FILL  # Red, green and blue of the padding to squares.
  axes: int = 1

  @property
  def resolution(self) -> int:
    """Height and width of frames in pixels."""
    return self.image

  @property
  def layout(self) -> Visual:
    """The layout of all videos."""
    return Visual(self.choose_grid(self.image, self.image, self.frames))

  def find_max_layout(self) -> Visual:
    """Returns the layout of all videos."""
    return self.layout

  def limit(self, fps: float, max_frames: int, max_pixels: int) -> "LlavaProcessor":
    """Returns the processor, whose videos have a fixed number of frames and a size.

    Raises:
      ValueError: a limit is not 0.
    """
    limits = {"fps": fps, "max_frames": max_frames, "max_pixels": max_pixels}
    if wrong := [f"{name}={value}" for name, value in limits.items() if value]:
      raise ValueError(
        f"{', '.join(wrong)}: this model reads {self.frames} frames of each video in "
        "one size. Set 0, and set frames to change their number."
      )
    return self

  def write_limits(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns no settings, because Hugging Face's LLaVA has no videos."""
    return {}, {}

  def fix_grids(self) -> "LlavaProcessor":
    """Returns the processor, whose grids have one size."""
    return self

  def make_reading(self, decoder: str) -> Reading:
    """Returns the settings for reading `frames` evenly spaced squares."""
    return Reading(
      ByCount(self.frames), square=self.image, fill=self.fill, decoder=decoder
    )

  def choose_grid(self, height: int, width: int, frames: int | None) -> Grid:
    """Returns the grid of a video, which does not depend on its height and width."""
    side = self.image // self.patch
    return Grid(frames or 1, side, side)

  def process(
    self, frames: UInt8[np.ndarray, "frames height width 3"], grid: Grid
  ) -> ProcessedVideo:
    """Returns frames unchanged: decoders resize them, and the tower normalizes them."""
    return ProcessedVideo(frames, grid)

  def arrange(
    self, features: Float[np.ndarray, "time tokens channels"], visual: Visual
  ) -> Float[np.ndarray, "time tokens channels"]:
    """Returns features unchanged, because the model pools them."""
    return features

  def write_text(self, visual: Visual) -> VideoText:
    r"""Returns the text of a video.

    >>> LlavaProcessor(8, image=16, patch=4).write_text(Visual(Grid(8, 4, 4)))
    [24, '\n']
    """
    return [_count_tokens(visual.grid), "\n"]

  def list_blocks(self, visual: Visual) -> list[Block]:
    """Returns the positions of a video, which count its tokens."""
    return [np.arange(_count_tokens(visual.grid))[:, None]]


def count_pooled_tokens(frames: int, patches: int) -> int:
  """Returns the number of tokens that models.projector.pool_video returns."""
  return patches if frames == 1 else frames + patches


def lay_out_features(count: int) -> VideoTokens:
  """Returns the tokens of a video of `count` features, and none for 0."""
  if not count:
    return NO_VIDEO
  return VideoTokens([[count, "\n"]], [np.arange(count)[:, None]])


def _count_tokens(grid: Grid) -> int:
  return count_pooled_tokens(grid.time, grid.height * grid.width)
