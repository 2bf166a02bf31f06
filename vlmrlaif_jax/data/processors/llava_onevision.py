"""Processor of LLaVA-OneVision (Li et al. 2024, 2408.03326), and of LLaVA-Video.

All frames are resized to one square. An image is resized to one square, and to a
rectangle of several squares, the crops. If a prompt has several images, each is one
square, to which it is padded. A video or an image is one run of placeholders, and its
positions are those of text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vlmrlaif_jax.data.decoding.squares import pad_and_resize
from vlmrlaif_jax.data.processors.anyres import AnyResolution, resize
from vlmrlaif_jax.data.processors.interface import (
  Block,
  Grid,
  ProcessedVideo,
  VariedVideos,
  VideoText,
  Visual,
)

_SIDES = tuple(384 * count for count in range(1, 7))
_ASPECT = "anyres_max_"  # Start of vision_aspect_ratio; the largest number follows.
# Settings and their names in the Hugging Face configs of both processors.
_FIXED = {
  "resample": 3,  # Bicubic.
  "rescale_factor": 1 / 255,
  **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
}
# Names that are read, or do not change what is processed here.
_KNOWN = {
  *("size", "image_mean", "image_std", "image_grid_pinpoints", "num_frames"),
  *("processor_class", "image_processor_type", "video_processor_type", "do_pad"),
  *("return_metadata", "data_format", "input_data_format"),
  *("default_to_square", "device", "do_sample_frames"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaOnevisionProcessor(VariedVideos):
  """Settings of the published checkpoints, and the methods of interface.Processor."""

  image: int = 384  # Side of a frame or crop in pixels, after it is resized.
  patch: int = 14  # Side of a patch, in pixels.
  frames: int = 32  # Frames that are read at most.
  rate: float = 0.0  # Frames per second that are read at most; 0 for no limit.
  pool: str = "bilinear"  # Pooling of the features of a frame, or "average".
  newline: str = "one_token"  # See models.llava_onevision.NEWLINES.
  has_times: bool = False  # Whether the text of a video has the times of its frames.
  # Heights and widths in pixels of the rectangles that crops form.
  pinpoints: tuple[tuple[int, int], ...] = tuple((a, b) for a in _SIDES for b in _SIDES)
  max_crops: int = 9  # Crops of which all features are used.
  width: int = 896  # Width of merged features.
  # Mean and standard deviation of pixels of videos, for red, green and blue.
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # Those of images.
  image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
  axes: int = 1

  @classmethod
  def from_config(
    cls, image: Mapping[str, Any], video: Mapping[str, Any], config: Mapping[str, Any]
  ) -> tuple["LlavaOnevisionProcessor", list[str]]:
    """Returns the processor of a checkpoint, and what it does not support of it.

    Args:
      image: the Hugging Face config of the image processor.
      video: that of the video processor.
      config: the config.json.
    """
    vision = config["vision_config"]
    settings: dict[str, Any] = {
      "image": vision["image_size"],
      "patch": vision["patch_size"],
      "width": config["text_config"]["hidden_size"],
      "pool": config.get("mm_spatial_pool_mode", cls.pool),
      "newline": config.get("mm_newline_position", cls.newline),
      "has_times": config.get("add_time_instruction", cls.has_times),
    }
    side, problems = vision["image_size"], []
    for kind, part in (("image", image), ("video", video)):
      problems += _check_processor(kind, part, side)
      for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in part:
          name = ours if kind == "video" else theirs
          settings[name] = tuple(part[theirs])
    pinpoints = config.get("image_grid_pinpoints")
    if image.get("image_grid_pinpoints", pinpoints) != pinpoints:
      problems.append("image_grid_pinpoints differ from those of config.json")
    if pinpoints:
      settings["pinpoints"] = tuple((height, width) for height, width in pinpoints)
      if any(length % side for pair in pinpoints for length in pair):
        problems.append(f"image_grid_pinpoints must be multiples of image_size={side}")
    aspect = str(config.get("vision_aspect_ratio", f"{_ASPECT}{cls.max_crops}"))
    if aspect.startswith(_ASPECT) and aspect.removeprefix(_ASPECT).isdecimal():
      settings["max_crops"] = int(aspect.removeprefix(_ASPECT))
    else:
      problems.append(f"vision_aspect_ratio must be {_ASPECT}9 or so, not {aspect}")
    frames = video.get("num_frames") or config.get("frames_upbound")
    settings["frames"] = frames or cls.frames
    return cls(**settings), problems

  def limit(
    self, fps: float = 0.0, max_frames: int = 0, max_pixels: int = 0
  ) -> "LlavaOnevisionProcessor":
    """Returns a processor that reads fewer frames.

    Args:
      fps: frames per second that are read at most; 0 for no change.
      max_frames: frames that are read at most; 0 for no change.
      max_pixels: pixels of all resized frames together; 0 for no limit. As frames have
        one size, it limits their number.

    Raises:
      ValueError: a limit is negative, or less than a frame.
    """
    if min(fps, max_frames, max_pixels) < 0:
      raise ValueError(
        f"fps={fps:g}, max_frames={max_frames} and max_pixels={max_pixels} must not be "
        "negative. Set 0 for the limit of the checkpoint."
      )
    each = self.image**2
    if 0 < max_pixels < each:
      raise ValueError(
        f"max_pixels={max_pixels} is less than the {each} pixels of a frame. Set at "
        f"least {each}."
      )
    limits = [x for x in (self.frames, max_frames, max_pixels // each) if x]
    rate = min((x for x in (self.rate, fps) if x), default=0.0)
    return dataclasses.replace(self, frames=min(limits), rate=rate)

  def write_limits(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the number of frames; transformers has no limit of their rate."""
    return {}, {"num_frames": self.frames, "do_sample_frames": True}

  @property
  def fps(self) -> float:
    """Frames per second that are read; of a folder of frames, those that it has."""
    return self.rate or 1.0

  @property
  def resolution(self) -> int:
    """Height and width of frames in pixels."""
    return self.image

  @property
  def side(self) -> int:
    """Rows and columns of the features of a crop."""
    return self.image // self.patch

  @property
  def pooled_side(self) -> int:
    """Rows and columns of the features of a frame."""
    return -(-self.side // 2) if self.pool == "bilinear" else self.side // 2

  @property
  def images(self) -> AnyResolution:
    """The settings of images."""
    return AnyResolution(
      self.image, self.side, self.pinpoints, self.max_crops, self.width
    )

  def find_max_layout(self) -> Visual:
    """Returns the layout of a video with the most tokens."""
    seconds = tuple(float(i) for i in range(self.frames))
    return Visual(Grid(self.frames, self.pooled_side, self.pooled_side), seconds)

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
    return np.asarray(resize(Image.fromarray(frame), self.image, self.image))

  def sample_frames(self, total: int, rate: float | None) -> Int[np.ndarray, " frames"]:
    """Returns indices of the first frames of equal parts of a video.

    Args:
      total: frames of the video.
      rate: frames per second of the video; None if its file does not state it.
    """
    count = min(self.frames, total)
    if self.rate and rate:
      count = min(count, max(1, int(total / rate * self.rate)))
    return np.arange(count) * total // count

  def choose_grid(self, height: int, width: int, frames: int | None) -> Grid:
    """Returns frames or crops, and the rows and columns of the features of each.

    The first crop of an image shows all of it. Others are parts of it, in raster order.
    The last one is the padded image, which is used in prompts with several images.

    Args:
      height: height of the frames or of the image in pixels, before it is resized.
      width: width of the frames.
      frames: number of frames; None for an image.
    """
    if frames is not None:
      return Grid(frames, self.pooled_side, self.pooled_side)
    rows, columns = self.images.choose_crops(height, width)
    return Grid(2 + rows * columns, self.side, self.side)

  def process(
    self, frames: UInt8[np.ndarray, "frames height width 3"], grid: Grid
  ) -> ProcessedVideo:
    """Resizes frames or cuts an image into crops, normalizes and cuts into patches.

    Args:
      frames: frames of a video, or one image.
      grid: result of `choose_grid`.
    """
    mean, std = self.mean, self.std
    if grid.height != self.pooled_side:
      mean, std = self.image_mean, self.image_std
      image = Image.fromarray(frames[0])
      fill = tuple(int(255 * x) for x in self.image_mean)
      squares = self.images.cut_crops(image)
      squares.append(pad_and_resize(image, self.image, fill))
    else:
      squares = [resize(Image.fromarray(x), self.image, self.image) for x in frames]
    center, scale = (255 * np.array(x, np.float32) for x in (mean, std))
    side = self.side * self.patch  # The margin is cut off.
    pixels = np.stack([np.asarray(x)[:side, :side] for x in squares])
    return ProcessedVideo(
      cut_square_patches((pixels - center) / scale, self.patch), grid
    )

  def write_text(self, visual: Visual) -> VideoText:
    r"""Returns the text that stands for an image or a video in a prompt.

    >>> video = Visual(Grid(2, 14, 14), seconds=(0.0, 1.0))
    >>> LlavaOnevisionProcessor().write_text(video)
    [393, '\n']
    """
    count = self._count_tokens(visual)
    if not (self.has_times and visual.seconds):
      return [count, "\n"]
    return [count, f"\n{_describe_times(visual)}\n"]

  def list_blocks(self, visual: Visual) -> list[Block]:
    """Returns the positions of an image or a video, which count its tokens."""
    return [np.arange(self._count_tokens(visual))[:, None]]

  def arrange(
    self, features: Float[np.ndarray, "time tokens channels"], visual: Visual
  ) -> Float[np.ndarray, "placeholders channels"]:
    """Returns the features of the placeholders of `write_text`, in their order.

    Args:
      features: features of each frame or crop. The last of each is the newline.
      visual: layout of the video or of a part of it, or of the image.
    """
    if visual.is_one_of_several:
      return features[-1]
    if visual.size:
      return self.images.arrange(features[:-1], *visual.size)
    flat = features.reshape(-1, features.shape[-1])
    if self.newline != "one_token":
      return flat
    frames = features[:, :-1].reshape(-1, features.shape[-1])
    return np.concatenate([frames, flat[-1:]])

  def _count_tokens(self, visual: Visual) -> int:
    time, rows, columns = visual.grid
    if visual.is_one_of_several:
      return self.side**2 + 1
    if visual.size:
      rows, columns = self.images.fit_features(*visual.size)
      return self.side**2 + rows * (columns + 1)
    newlines = {"one_token": 1, "frame": time, "grid": time * rows}
    return time * rows * columns + newlines[self.newline]


def _describe_times(visual: Visual) -> str:
  """Returns LLaVA-Video's sentences about the times of frames (2410.02713)."""
  count, duration = len(visual.seconds), visual.seconds[-1]
  if visual.rate:
    duration = count / visual.rate
  times = ",".join(f"{time:.2f}s" for time in visual.seconds)
  return (
    f"The video lasts for {duration:.2f} seconds, and {count} frames are uniformly "
    f"sampled from it. These frames are located at {times}.Please answer the following "
    "questions related to this video."
  )


def _check_processor(kind: str, config: Mapping[str, Any], side: int) -> list[str]:
  """Returns a line for each key of a processor that is not supported."""
  size = config.get("size")
  problems = []
  if size not in (None, {"height": side, "width": side}):
    problems.append(f"size of the {kind} processor must be {side} x {side}, not {size}")
  for name, value in config.items():
    if name in _FIXED and value not in (None, _FIXED[name]):
      problems.append(
        f"{name} of the {kind} processor must be {_FIXED[name]}, not {value}"
      )
    elif name not in _FIXED.keys() | _KNOWN and value:
      problems.append(f"{name}={value} of the {kind} processor is not supported")
  return problems


def cut_square_patches(
  frames: Float[np.ndarray, "frames height width 3"], patch: int
) -> Float[np.ndarray, "patches channels"]:
  """Cuts frames into patches in raster order; channels are row, column and color.

  Args:
    frames: frames whose sides are multiples of a patch.
    patch: side of a patch, in pixels.
  """
  count, height, width, _ = frames.shape
  x = frames.reshape(count, height // patch, patch, width // patch, patch, 3)
  return np.ascontiguousarray(x.swapaxes(2, 3)).reshape(-1, 3 * patch**2)
