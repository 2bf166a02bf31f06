"""Settings, sizes and patches that the processors of Qwen2.5-VL and Qwen3-VL share.

Two frames form a temporal patch. Frames are resized to multiples of the side of a
token, within a budget of pixels.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vlmrlaif_jax.data.decoding.files import MAX_PIXELS
from vlmrlaif_jax.data.processors.interface import (
  Grid,
  ProcessedVideo,
  VariedVideos,
  Visual,
  fix_grid,
)
from vlmrlaif_jax.data.processors.sizes import FRAMES, RATIOS, fit_size, list_sizes

ProcessorT = TypeVar("ProcessorT", bound="TemporalPatches")
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
class TemporalPatches(VariedVideos):
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
  is_fixed: bool = False  # Whether grids have the sizes of list_sizes.
  axes: int = 3

  @abc.abstractmethod
  def sample_frames(self, total: int, rate: float | None) -> Int[np.ndarray, " frames"]:
    """Returns indices of the frames to read.

    Args:
      total: frames of the video.
      rate: frames per second of the video; None if its file does not state it.
    """

  @abc.abstractmethod
  def fit_video(self, height: int, width: int, frames: int) -> tuple[int, int]:
    """Returns the height and width to which a number of frames are resized."""

  @property
  @abc.abstractmethod
  def frame_limits(self) -> tuple[int, int]:
    """The least and most pixels of a frame of a video with `max_frames` frames."""

  @property
  @abc.abstractmethod
  def least_frame(self) -> int:
    """Pixels that each frame has in spite of `limit_pixels`."""

  @abc.abstractmethod
  def limit_pixels(self: ProcessorT, max_pixels: int) -> ProcessorT:
    """Returns the processor with a limit of the pixels of all frames of a video."""

  @property
  def multiple(self) -> int:
    """Pixels that the sides of a resized frame are multiples of."""
    return self.patch * self.merge

  @property
  def counted_frames(self) -> int:
    """Frames of the temporal patches of a video with `max_frames` frames."""
    return max(1, -(-self.max_frames // FRAMES)) * FRAMES

  @property
  def resolution(self) -> str:
    """Limits of pixels."""
    sizes = " in a short list of sizes" if self.is_fixed else ""
    return f"{self.min_pixels} to {self.max_pixels} pixels{sizes}"

  def find_max_layout(self) -> Visual:
    """Returns the layout of a video with the most tokens, for sides of RATIOS."""
    totals = range(FRAMES, max(self.max_frames, FRAMES) + 1)
    counts = {len(self.sample_frames(total, self.fps)) for total in totals}
    if self.is_fixed:
      counts = {max(counts)}  # The size of a frame does not depend on their number.
    heights = [int(math.sqrt(MAX_PIXELS / ratio)) for ratio in RATIOS]
    layouts = (
      (self.choose_grid(height, MAX_PIXELS // height, count), count)
      for count in counts
      for height in heights
    )
    grid, count = max(layouts, key=lambda layout: (math.prod(layout[0]), layout[1]))
    return Visual(grid, tuple(number / self.fps for number in range(count)))

  def limit(
    self: ProcessorT, fps: float, max_frames: int, max_pixels: int
  ) -> ProcessorT:
    """Returns the processor with other limits; 0 leaves one as it is.

    Args:
      fps: frames per second that are read.
      max_frames: frames that are read of a video at most.
      max_pixels: pixels of all frames of a video together, or of an image, at most.

    Raises:
      ValueError: a limit is out of range.
    """
    if fps and not 0 < fps < math.inf:
      raise ValueError(f"fps must be greater than 0, got {fps}. Set 0 for the default.")
    if max_frames and max_frames < FRAMES:
      raise ValueError(
        f"max_frames must be {FRAMES} or more, because {FRAMES} frames form a temporal "
        f"patch, got {max_frames}. Set 0 for the default."
      )
    limited = dataclasses.replace(
      self, fps=fps or self.fps, max_frames=max_frames or self.max_frames
    )
    if not max_pixels:
      return limited
    least = limited.counted_frames * limited.least_frame
    if max_pixels < least:
      raise ValueError(
        f"max_pixels must be {least} or more, because each of max_frames="
        f"{limited.max_frames} frames has at least {limited.least_frame} pixels, got "
        f"{max_pixels}. Raise it, lower max_frames, or set 0 for the default."
      )
    return dataclasses.replace(
      limited.limit_pixels(max_pixels),
      min_image_pixels=min(self.min_image_pixels, max_pixels),
      max_image_pixels=min(self.max_image_pixels, max_pixels),
    )

  def write_limits(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of `limit`; pixels have other names in older configs."""
    pixels = lambda least, most: {
      "size": {"shortest_edge": least, "longest_edge": most},
      **dict.fromkeys(("min_pixels", "max_pixels")),
    }
    return pixels(self.min_image_pixels, self.max_image_pixels), {
      **pixels(self.min_pixels, self.max_pixels),
      "fps": self.fps,
      "max_frames": self.max_frames,
      "do_sample_frames": True,
    }

  def fix_grids(self: ProcessorT) -> ProcessorT:
    """Returns the processor with the sizes of list_sizes, so that grids are few.

    The size of a video then depends on that of its frames, but not on their number: the
    pixels of a video are limited as if it had `max_frames` frames.
    """
    return dataclasses.replace(self, is_fixed=True)

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
    else:
      limits = self.frame_limits
      size = self.fit_video(
        height, width, self.counted_frames if self.is_fixed else frames
      )
    time = -(-(frames or 1) // FRAMES)
    grid = Grid(time, *(side // self.patch for side in size))
    if self.is_fixed:
      return fix_grid(grid, list_sizes(*limits, self.patch, self.merge))
    return grid

  def resize(
    self, frame: UInt8[np.ndarray, "height width 3"], frames: int | None
  ) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Returns a frame in the size of its grid.

    Args:
      frame: frame of a video, or an image.
      frames: frames that are read of the video; None for an image.
    """
    height, width, _ = frame.shape
    grid = self.choose_grid(height, width, frames)
    size = grid.width * self.patch, grid.height * self.patch
    image = Image.fromarray(frame)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))

  def process(
    self, frames: UInt8[np.ndarray, "frames height width 3"], grid: Grid
  ) -> ProcessedVideo:
    """Normalizes frames by `resize` and cuts them into patches.

    Args:
      frames: frames of a video, or one image. The last one is repeated to fill the last
        temporal patch.
      grid: result of `choose_grid`.

    Raises:
      ValueError: the frames have another size than the grid.
    """
    size = grid.height * self.patch, grid.width * self.patch
    if frames.shape[1:3] != size:
      raise ValueError(
        f"frames of {frames.shape[1]} x {frames.shape[2]} pixels do not have the size "
        f"of their grid, {size[0]} x {size[1]}. Resize them by `resize`."
      )
    is_image = len(frames) == 1
    mean = self.image_mean if is_image else self.mean
    std = self.image_std if is_image else self.std
    count = grid.time * FRAMES - len(frames)
    frames = np.concatenate([frames, *[frames[-1:]] * count])
    center, scale = (255 * np.array(x, np.float32) for x in (mean, std))
    pixels = (frames - center) / scale
    return ProcessedVideo(cut_temporal_patches(pixels, self.patch, self.merge), grid)

  def arrange(
    self, features: Float[np.ndarray, "time tokens channels"], visual: Visual
  ) -> Float[np.ndarray, "places channels"]:
    """Returns the features of the placeholders, which are those of all patches."""
    return features.reshape(-1, features.shape[-1])


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
