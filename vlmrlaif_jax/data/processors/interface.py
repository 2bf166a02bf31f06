"""Interface of the processors of model families, and what is common to them.

A processor chooses frames, cuts them into patches, writes the text that stands for a
video in a prompt, and gives each token a position. Families differ in these points:

- LLaVA-1.5 with pooled videos: the grid is fixed. The text of a video is one number,
  so a run of placeholders. Positions have one axis, and a block counts from 0.
- LLaVA-OneVision: 27 x 27 patches of a frame become 14 x 14 tokens. The text is one
  number, 196 per frame and one for the newline at the end. Positions have one axis.
- SmolVLM2: squares of 64 tokens. The text of each frame is "Frame from MM:SS:" and 64.
  Positions have one axis.
- Qwen2.5-VL, Qwen3-VL: see their files.

A video is processed in this order: decoding by `make_reading`, `choose_grid`,
`process`, the vision tower, `arrange`. `lay_out` returns its text, which becomes the
token ids of the prompt, and its blocks, which become their positions. A conversation
may have several videos and images; `lay_out` returns those of all.

The tower is compiled once for each size of frames. `fix_grids` limits the sizes of a
run to a short list. Without it, each video has the exact size of its family.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vlmrlaif_jax.data.decoding.sampling import ByRule
from vlmrlaif_jax.data.video import Frames, Reading, Resizing

# Texts, and between them the numbers of tokens that receive features.
VideoText: TypeAlias = list[str | int]
# Position of each token of a sequence, on each axis.
Positions: TypeAlias = Int[np.ndarray, "tokens axes"]
# Positions of a run of placeholders, relative to its start.
Block: TypeAlias = Int[np.ndarray, "_run axes"]


VariedT = TypeVar("VariedT")


class Grid(NamedTuple):
  """Patches of an image or a video along each axis."""

  time: int  # Temporal patches; 1 for an image.
  height: int  # Rows of patches.
  width: int  # Columns of patches.


class Visual(NamedTuple):
  """An image or a video as a part of a prompt."""

  grid: Grid
  seconds: tuple[float, ...] = ()  # Time of each frame in the video; () for an image.
  # Frames per second: their number / the seconds of the video; 0 for an image.
  rate: float = 0.0
  # Height and width of an image in pixels, before it is resized; () for a video.
  size: tuple[int, ...] = ()
  is_one_of_several: bool = False  # Whether it is an image of a prompt with others.

  @property
  def patch_frames(self) -> int:
    """Number of frames of a temporal patch; 1 for an image."""
    return max(-(-len(self.seconds) // self.grid.time), 1)

  def select(self, start: int, stop: int | None) -> "Visual":
    """Returns a range of temporal patches, which are frames in some families."""
    grid, seconds = self.grid, self.seconds
    each = self.patch_frames
    start, stop, _ = slice(start, stop).indices(grid.time)
    part = grid._replace(time=stop - start)
    return self._replace(grid=part, seconds=seconds[start * each : stop * each])


class ProcessedVideo(NamedTuple):
  """An image or a video as the vision tower reads it."""

  # Normalized, in the tower's order; or frames that the tower normalizes.
  pixels: (
    Float[np.ndarray, "patches channels"] | UInt8[np.ndarray, "frames height width 3"]
  )
  grid: Grid


class VideoTokens(NamedTuple):
  """The tokens that stand for videos and images in a prompt; empty without any."""

  texts: Sequence[VideoText] = ()  # Text of each video or image, in order.
  blocks: Sequence[Block] = ()  # Positions of each run of placeholders of all texts.
  axes: int = 1  # Axes of positions, including those of text.


NO_VIDEO = VideoTokens()


@runtime_checkable
class Processor(Protocol):
  """The host side of a model family."""

  @property
  def axes(self) -> int:
    """Number of axes of positions."""
    ...

  @property
  def resolution(self) -> int | str:
    """Height and width of frames in pixels, or the limits of their size."""
    ...

  @property
  def layout(self) -> Visual | None:
    """The layout of all videos; None if each has its own."""
    ...

  def find_max_layout(self) -> Visual:
    """Returns the layout of a video with the most tokens."""
    ...

  def limit(self, fps: float, max_frames: int, max_pixels: int) -> "Processor":
    """Returns the processor with other limits; 0 leaves one as it is.

    Args:
      fps: frames per second that are read.
      max_frames: frames that are read of a video at most.
      max_pixels: pixels of all frames of a video together at most, after resizing.

    Raises:
      ValueError: a limit is out of range, or the family does not have it.
    """
    ...

  def write_limits(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns settings of the limits, as of Hugging Face's image and video processor.

    A setting of None is one to remove.
    """
    ...

  def fix_grids(self) -> "Processor":
    """Returns the processor with a short list of sizes of frames.

    The list depends on the settings only, so that it is the same in all processes.
    """
    ...

  def make_reading(self, decoder: str) -> Reading:
    """Returns the settings for reading videos with a decoder of video.DECODERS."""
    ...

  def choose_grid(self, height: int, width: int, frames: int | None) -> Grid:
    """Returns the grid of a video, or of an image if `frames` is None."""
    ...

  def process(
    self, frames: UInt8[np.ndarray, "frames height width 3"], grid: Grid
  ) -> ProcessedVideo:
    """Normalizes frames, as `make_reading` reads them, and cuts them into patches."""
    ...

  def arrange(
    self, features: Float[np.ndarray, "time tokens channels"], visual: Visual
  ) -> Float[np.ndarray, "..."]:
    """Returns the features of a prompt from those of temporal patches.

    Args:
      features: features by the vision tower of each temporal patch, or of each frame or
        crop in some families. They may be a range of those of a video.
      visual: layout of the video, of the range, or of the image.

    Returns:
      The features of the placeholders; or those of frames, if the model pools them.
    """
    ...

  def write_text(self, visual: Visual) -> VideoText:
    """Returns the text that stands for an image or a video in a prompt.

    It includes the tokens that chat templates write around a placeholder.
    """
    ...

  def list_blocks(self, visual: Visual) -> list[Block]:
    """Returns the positions of the runs of placeholders of `write_text`."""
    ...


class VariedVideos(ByRule, Resizing, Protocol):
  """Methods of the processors whose videos have layouts of their own."""

  @property
  def layout(self) -> None:
    """None, because each video has its own layout."""
    return None

  def fix_grids(self: VariedT) -> VariedT:
    """Returns the processor itself, for a family whose frames have one size."""
    return self

  def make_reading(self, decoder: str) -> Reading:
    """Returns the settings for reading frames by `sample_frames` and `resize`."""
    return Reading(self, decoder=decoder, resizing=self)


def process_frames(
  processor: Processor, frames: Frames
) -> tuple[ProcessedVideo, Visual]:
  """Returns the pixels of a video or an image, and its layout.

  An image has no times. A video may have a single frame.

  Raises:
    ValueError: The frames have a size that the family does not support.
  """
  count = len(frames.pixels)
  is_image = count == 1 and not frames.rate
  grid = processor.choose_grid(*frames.size, None if is_image else count)
  # Without errors of sums, which would change the decimals that a text has.
  seconds = () if is_image else tuple(frames.seconds.round(6).tolist())
  size = frames.size if is_image else ()
  layout = processor.layout or Visual(grid, seconds, frames.rate, size)
  return processor.process(frames.pixels, grid), layout


def mark_several(visuals: Sequence[Visual]) -> list[Visual]:
  """Returns the layouts of a prompt, in which images are marked if they are several."""
  several = sum(not visual.seconds for visual in visuals) > 1
  return [
    visual._replace(is_one_of_several=several and not visual.seconds)
    for visual in visuals
  ]


def lay_out(processor: Processor, *visuals: Visual) -> VideoTokens:
  """Returns the tokens that stand for images and videos in a prompt, in order."""
  visuals = tuple(mark_several(visuals))
  texts = [processor.write_text(visual) for visual in visuals]
  blocks = [block for visual in visuals for block in processor.list_blocks(visual)]
  return VideoTokens(texts, blocks, processor.axes)


def fix_grid(grid: Grid, sizes: Sequence[tuple[int, int]]) -> Grid:
  """Replaces the height and width of a grid by the nearest of a few sizes.

  The distance of two sizes is the sum of the logarithms of the ratios of their heights
  and of their widths.

  >>> fix_grid(Grid(4, 22, 40), [(24, 24), (18, 32), (32, 18)])
  Grid(time=4, height=18, width=32)
  """

  def distance(size):
    return sum(abs(math.log(a / b)) for a, b in zip(size, grid[1:], strict=True))

  return Grid(grid.time, *min(sizes, key=distance))


def count_features(video: VideoTokens) -> int:
  """Returns the number of features of all videos and images."""
  return sum(part for text in video.texts for part in text if isinstance(part, int))


def make_positions(
  has_feature: Bool[np.ndarray, " tokens"], blocks: Sequence[Block], *, axes: int
) -> Positions:
  """Returns the positions of a sequence of text, images and videos.

  Text is counted equally on all axes. A block starts after the greatest position before
  it, and what follows continues after the greatest position of the block.

  >>> line = np.arange(2)[:, None]
  >>> print(make_positions(np.array([False, True, True]), [line], axes=1).T)
  [[0 1 2]]

  Args:
    has_feature: whether each token is a placeholder of a feature.
    blocks: the blocks of all images and videos, in the order of the sequence.
    axes: number of axes.

  Raises:
    ValueError: The placeholders are not those of the blocks.
  """
  count = sum(map(len, blocks))
  if np.sum(has_feature) != count:
    raise ValueError(
      f"the sequence has {np.sum(has_feature)} placeholders, but its images and videos "
      f"have {count} features. Give the images and videos of this sequence."
    )
  positions = np.empty((len(has_feature), axes), np.int32)
  places, done, start = np.flatnonzero(has_feature), 0, 0
  for block in blocks:
    run, places = places[: len(block)], places[len(block) :]
    if run[-1] - run[0] + 1 != len(run):
      raise ValueError(
        f"the {len(run)} placeholders from token {run[0]} on are one run of an image "
        f"or a video, but end at token {run[-1]}. Do not split them."
      )
    text = run[0] - done
    positions[done : run[0]] = np.arange(start, start + text)[:, None]
    positions[run] = block + start + text
    start += text + block.max() + 1
    done = run[-1] + 1
  positions[done:] = np.arange(start, start + len(has_feature) - done)[:, None]
  return positions
