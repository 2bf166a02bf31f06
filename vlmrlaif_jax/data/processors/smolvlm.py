"""Processor of SmolVLM2 (Marafioti et al. 2025, 2504.05299).

Frames become squares of one size, and each is named by its time in the text of a video.
An image is cut into crops of that size, which are followed by the whole image.
"""

import dataclasses
import datetime
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
  VariedVideos,
  VideoText,
  Visual,
  count_features,
  lay_out,
)
from vlmrlaif_jax.data.processors.qwen3_vl import DEFAULT_RATE

_MAX_SIDE = 4096  # Greatest length of the longer side of a resized image, in pixels.
_SKIP_S = 1.0  # Seconds at both ends of a long video of which no frame is read.
_MAX_COUNT = 999  # Greatest number of frames, which the text of a video spells.

_START, _IMAGE = "<fake_token_around_image>", "<global-img>"
# Keys with one supported value. 1 is Lanczos.
_FIXED = {
  "resample": 1,
  **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
}
# Keys that are read, or do not change what is processed here.
_USED = {
  *("size", "max_image_size", "image_mean", "image_std", "do_image_splitting"),
  *("video_sampling", "fps", "num_frames", "do_sample_frames", "do_pad"),
  *("processor_class", "image_processor_type", "video_processor_type"),
  *("return_metadata", "return_row_col_info", "rescale_factor", "data_format"),
  *("input_data_format", "default_to_square", "device", "disable_grouping"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolVLMProcessor(VariedVideos):
  """Settings of the published checkpoints, and the methods of interface.Processor."""

  side: int = 512  # Height and width of a frame or a crop, in pixels.
  patch: int = 16  # Side of a patch, in pixels.
  merge: int = 4  # Side of the squares of patches that become one token.
  fps: float = 1.0  # Frames per second that are read.
  max_frames: int = 64  # Frames that are read at most.
  # Longer side of a frame and of an image in pixels, before it becomes squares.
  longest: int = 2048
  image_longest: int = 2048
  split: bool = True  # Whether images are cut into crops.
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # Of pixels: red, green and blue.
  std: tuple[float, ...] = (0.5, 0.5, 0.5)  # Standard deviation of pixels.
  axes: int = 1

  @classmethod
  def from_config(
    cls, image: Mapping[str, Any], video: Mapping[str, Any], config: Mapping[str, Any]
  ) -> tuple["SmolVLMProcessor", list[str]]:
    """Returns the processor of a checkpoint, and what it does not support of it.

    Args:
      image: the Hugging Face config of the image processor.
      video: that of the video processor, which may be the same.
      config: the config.json.
    """
    side = config["vision_config"]["image_size"]
    settings: dict[str, Any] = {}
    for setting, key in (("mean", "image_mean"), ("std", "image_std")):
      if key in image:
        settings[setting] = tuple(image[key])
    for setting, part in (("longest", video), ("image_longest", image)):
      if "size" in part:
        settings[setting] = part["size"].get("longest_edge", 0)
    sampling = video.get("video_sampling") or {}
    if fps := sampling.get("fps", video.get("fps")):
      settings["fps"] = float(fps)
    if frames := sampling.get("max_frames", video.get("num_frames")):
      settings["max_frames"] = frames
    processor = cls(
      side=side,
      patch=config["vision_config"]["patch_size"],
      merge=config["scale_factor"],
      split=image.get("do_image_splitting", True),
      **settings,
    )
    return processor, _list_problems(processor, image, video)

  @property
  def resolution(self) -> int:
    """Height and width of frames in pixels."""
    return self.side

  def find_max_layout(self) -> Visual:
    """Returns the layout with the most tokens, of a video or an image of all crops."""
    seconds = tuple(i / self.fps for i in range(self.max_frames))
    crops = math.ceil(self.image_longest / self.side) if self.split else 1
    layouts = (
      Visual(self._make_grid(self.max_frames, 1, 1), seconds, self.fps),
      Visual(self._make_grid(1, crops, crops)),
    )
    return max(layouts, key=lambda layout: count_features(lay_out(self, layout)))

  def limit(
    self, fps: float = 0.0, max_frames: int = 0, max_pixels: int = 0
  ) -> "SmolVLMProcessor":
    """Returns the processor with other limits; 0 leaves a limit unchanged.

    Args:
      fps: frames per second that are read.
      max_frames: frames that are read at most.
      max_pixels: pixels of all frames of a video together, after they are resized. The
        size of frames is fixed, so this limits their number.

    Raises:
      ValueError: A limit is negative, is too high, or allows no frame.
    """
    if min(fps, max_frames, max_pixels) < 0 or max_frames > _MAX_COUNT:
      raise ValueError(
        f"fps={fps}, max_frames={max_frames} and max_pixels={max_pixels} must be 0 or "
        f"more, and max_frames at most {_MAX_COUNT}. Set 0 for those of the checkpoint."
      )
    frames = max_frames or self.max_frames
    if max_pixels:
      frames = min(frames, max_pixels // self.side**2)
    if not frames:
      raise ValueError(
        f"max_pixels={max_pixels} is less than a frame of {self.side} x {self.side} "
        f"pixels. Set it to {self.side**2} or more."
      )
    return dataclasses.replace(self, fps=fps or self.fps, max_frames=frames)

  def write_limits(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of `limit`, as the published configs have them."""
    sampling = {
      "fps": self.fps,
      "max_frames": self.max_frames,
      "video_size": {"longest_edge": self.longest},
    }
    return {}, {"video_sampling": sampling, "do_sample_frames": True}

  def resize(
    self, frame: UInt8[np.ndarray, "height width 3"], frames: int | None
  ) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Returns a frame of a video as a square; an image remains as it is.

    Args:
      frame: frame of a video, or an image.
      frames: frames that are read of the video; None for an image.
    """
    if frames is None:
      return frame
    return self._resize_in_steps(frame, self.longest, self.side, self.side)

  def _resize_in_steps(
    self, frame: UInt8[np.ndarray, "old_height old_width 3"], longest: int, *size: int
  ) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes the longer side to a length, then both sides to a height and width."""
    return resize_frame(
      resize_frame(frame, *fit_longest(frame.shape[:2], longest)), *size
    )

  def sample_frames(self, total: int, rate: float | None) -> Int[np.ndarray, " frames"]:
    """Returns evenly spaced indices of frames, `fps` of each second.

    Args:
      total: frames of the video.
      rate: frames per second of the video; None if its file does not state it.
    """
    rate = rate or DEFAULT_RATE
    duration = total / rate
    count = max(1, min(round(self.fps * duration), self.max_frames))
    start, end = 0, total - 1
    if duration - 2 * _SKIP_S > self.max_frames * self.fps:
      start, end = int(_SKIP_S * rate), min(int(total - _SKIP_S * rate), end)
    if start >= end:
      start, end = 0, total - 1
    return np.unique(np.linspace(start, end, count, dtype=int))

  def choose_grid(self, height: int, width: int, frames: int | None) -> Grid:
    """Returns the grid of a video, or of an image if `frames` is None.

    The grid of an image is that of its crops, without the whole image behind them.

    Args:
      height: height of the frames in pixels, before they are resized.
      width: width of the frames.
      frames: number of frames.
    """
    if frames is not None or not self.split:
      return self._make_grid(frames or 1, 1, 1)
    height, width = fit_longest((height, width), self.image_longest)
    crops = lambda pixels: math.ceil(pixels / self.side)
    ratio = width / height
    if width >= height:
      columns = crops(width)
      return self._make_grid(1, crops(int(columns * self.side / ratio)), columns)
    rows = crops(height)
    return self._make_grid(1, rows, crops(int(rows * self.side * ratio)))

  def _make_grid(self, time: int, rows: int, columns: int) -> Grid:
    patches = self.side // self.patch
    return Grid(time, rows * patches, columns * patches)

  def _count_crops(self, grid: Grid) -> tuple[int, int]:
    """Returns the rows and columns of crops of a grid."""
    patches = self.side // self.patch
    return grid.height // patches, grid.width // patches

  def process(
    self, frames: UInt8[np.ndarray, "frames height width 3"], grid: Grid
  ) -> ProcessedVideo:
    """Normalizes frames, which are squares, or cuts an image into crops first.

    As in the published processor, an image is resized in steps: first so that the
    longer side has a fixed length, then to a multiple of a square. The whole image
    behind the crops follows from the result.

    Args:
      frames: frames of a video by `resize`, or one image.
      grid: result of `choose_grid`.
    """
    rows, columns = self._count_crops(grid)
    squares = []
    for frame in frames:
      whole = frame
      size = rows * self.side, columns * self.side
      if frame.shape[:2] != (self.side, self.side):
        whole = self._resize_in_steps(frame, self.image_longest, *size)
      if rows * columns > 1:
        split = whole.reshape(rows, self.side, columns, self.side, 3).swapaxes(1, 2)
        squares += [*split.reshape(-1, self.side, self.side, 3)]
        whole = resize_frame(whole, self.side, self.side)
      squares.append(whole)
    center, scale = (255 * np.array(x, np.float32) for x in (self.mean, self.std))
    pixels = [cut_squares((square - center) / scale, self.patch) for square in squares]
    return ProcessedVideo(np.concatenate(pixels), grid)

  def arrange(
    self, features: Float[np.ndarray, "time tokens channels"], visual: Visual
  ) -> Float[np.ndarray, "all channels"]:
    """Returns the features of the placeholders from those of all frames."""
    return features.reshape(-1, features.shape[-1])

  def write_text(self, visual: Visual) -> VideoText:
    r"""Returns the text that stands for an image or a video in a prompt.

    >>> clip = Visual(Grid(1, 32, 32), seconds=(61.5,), rate=0.5)
    >>> print("".join(map(str, SmolVLMProcessor().write_text(clip))).strip())
    You are provided the following series of one frames from a 0:00:02 [H:MM:SS] video.
    <BLANKLINE>
    Frame from 01:01:<fake_token_around_image><global-img>64<fake_token_around_image>
    """
    count = (self.side // self.patch // self.merge) ** 2
    if not visual.seconds:
      labels, end = self._label_crops(visual.grid), _START
    else:
      first, *more = [
        f"\nFrame from {int(t // 60):02d}:{int(t % 60):02d}:{_START}{_IMAGE}"
        for t in visual.seconds
      ]
      labels = [_introduce(visual) + first, *(_START + label for label in more)]
      end = f"{_START}\n\n"
    return [part for label in labels for part in (label, count)] + [end]

  def _label_crops(self, grid: Grid) -> list[str]:
    """Returns the texts before the crops of an image and before the whole image."""
    rows, columns = self._count_crops(grid)
    if rows * columns == 1:
      return [_START + _IMAGE]
    lines = [
      [f"{_START}<row_{row + 1}_col_{column + 1}>" for column in range(columns)]
      for row in range(rows)
    ]
    for line in lines[1:]:
      line[0] = "\n" + line[0]
    return [*(label for line in lines for label in line), f"\n\n{_START}{_IMAGE}"]

  def list_blocks(self, visual: Visual) -> list[Block]:
    """Returns the positions of each frame or crop, which count its tokens."""
    runs = [part for part in self.write_text(visual) if isinstance(part, int)]
    return [np.arange(run)[:, None] for run in runs]


def _list_problems(
  processor: SmolVLMProcessor, image: Mapping[str, Any], video: Mapping[str, Any]
) -> list[str]:
  """Returns a line for each key of the configs that is not supported."""
  problems = []
  for kind, part in (("image", image), ("video", video)):
    fixed = {
      **_FIXED,
      "max_image_size": {"longest_edge": processor.side},
      "image_mean": list(processor.mean),
      "image_std": list(processor.std),
    }
    for key, value in part.items():
      if key in fixed and value not in (None, fixed[key]):
        problems.append(f"{key} of the {kind} processor must be {fixed[key]}")
      elif value and key not in fixed.keys() | _USED:
        problems.append(f"{key}={value} of the {kind} processor is not supported")
  for key, value, most in (
    ("size.longest_edge of the video processor", processor.longest, _MAX_SIDE),
    ("size.longest_edge of the image processor", processor.image_longest, _MAX_SIDE),
    ("fps of the video processor", processor.fps, math.inf),
    ("max_frames of the video processor", processor.max_frames, _MAX_COUNT),
  ):
    if not 0 < value <= most:
      problems.append(f"{key} must be more than 0 and at most {most}, got {value}")
  return problems


def _introduce(visual: Visual) -> str:
  """Returns the sentence before the frames of a video."""
  count, duration = len(visual.seconds), visual.seconds[-1]
  if visual.rate:
    duration = round(count / visual.rate, 6)  # Without the error of the division.
  length = datetime.timedelta(seconds=int(duration))
  return (
    f"You are provided the following series of {spell_number(count)} frames from a "
    f"{length} [H:MM:SS] video.\n"
  )


_SMALL = (
  *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
  *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
  *("seventeen", "eighteen", "nineteen"),
)
_TENS = (
  *("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty"),
  "ninety",
)


def spell_number(number: int) -> str:
  """Returns a number from 0 to 999 in words.

  >>> spell_number(164)
  'one hundred and sixty-four'
  """
  hundreds, rest = divmod(number, 100)
  words = f"{_SMALL[hundreds]} hundred" if hundreds else ""
  if not rest and words:
    return words
  tens, ones = divmod(rest, 10)
  small = _SMALL[rest] if rest < 20 else _TENS[tens] + (f"-{_SMALL[ones]}" * (ones > 0))
  return f"{words} and {small}" if words else small


def fit_longest(size: tuple[int, ...], longest: int) -> tuple[int, int]:
  """Returns the size of a frame whose longer side is resized to `longest` pixels.

  The other side is rounded down, and then up to an even number.

  Args:
    size: height and width of the frame in pixels.
    longest: pixels of the longer side.
  """
  height, width = size
  ratio = width / height
  even = lambda side: max(1, int(side) + int(side) % 2)
  if width >= height:
    return even(longest / ratio), longest
  return longest, even(longest * ratio)


def resize_frame(
  frame: UInt8[np.ndarray, "height width 3"], height: int, width: int
) -> UInt8[np.ndarray, "new_height new_width 3"]:
  """Resizes a frame by Lanczos' filter."""
  if frame.shape[:2] == (height, width):
    return frame
  image = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
  return np.asarray(image)


def cut_squares(
  square: Float[np.ndarray, "side side 3"], patch: int
) -> Float[np.ndarray, "patches channels"]:
  """Cuts a square into patches in raster order; a margin that is no patch is cut off.

  The channels are row, column and color, as in clip.cut_patches.
  """
  count = len(square) // patch
  x = square[: count * patch, : count * patch].reshape(count, patch, count, patch, 3)
  return x.swapaxes(1, 2).reshape(count**2, -1)
