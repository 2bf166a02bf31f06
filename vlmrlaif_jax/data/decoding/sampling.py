"""Selection of the frames of a video that are read, by their times."""

import math
from fractions import Fraction
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

CLOCK_S = 1e-3  # Containers round times to at most a millisecond.
MAX_STRETCH = 2.0  # Largest gap between frames, in gaps between evenly spaced times.


class ByCount(NamedTuple):
  """A fixed number of frames, evenly spaced in time, with the first and the last."""

  frames: int


class ByFps(NamedTuple):
  """Frames in proportion to the duration, evenly spaced in time, with both ends."""

  fps: float  # Frames per second of video.
  min_frames: int  # Frames of a short video. They repeat if it has fewer.
  max_frames: int  # Frames of a long video.


@runtime_checkable
class ByRule(Protocol):
  """The rule of a model family, which counts frames."""

  @property
  def fps(self) -> float:
    """Frames per second of video."""
    ...

  def sample_frames(self, total: int, rate: float | None) -> Int[np.ndarray, " frames"]:
    """Returns indices of frames of a video with `total` frames, `rate` per second."""
    ...


Sampling: TypeAlias = ByCount | ByFps | ByRule
MAX_DENOMINATOR = 1001  # Of rates, which are like 25 or 30000 / 1001.


def sample_frame_indices(total: int, count: int) -> Int[np.ndarray, " frames"]:
  """Returns `count` evenly spaced frame indices, including the first and the last.

  Indices are rounded down, as in VLM-RLAIF's Evaluation/infer_utils.py.

  Args:
    total: Frames of the video.
    count: Frames to select. Indices repeat if `total` is less.

  Raises:
    ValueError: A number is less than 1.
  """
  if total < 1 or count < 1:
    raise ValueError(f"cannot take {count} frames out of {total}: both must be >= 1")
  return np.linspace(0, total - 1, count, dtype=int)


class Timeline(NamedTuple):
  """The times at which the frames of a video are on screen."""

  seconds: Float[np.ndarray, " total"]  # Start of each frame, in order, from 0.
  duration: float  # End of the last frame, in seconds.

  @property
  def rate(self) -> float | None:
    """Frames per second; None for a picture, which has no duration."""
    if self.duration <= 0:
      return None
    rate = len(self.seconds) / self.duration  # Sums of times are not exact.
    return float(Fraction(rate).limit_denominator(MAX_DENOMINATOR))


class Selection(NamedTuple):
  """The frames of a video that are read."""

  numbers: list[int]  # Indices in order; they may repeat.
  seconds: list[float]  # Time of each, after the video's first frame.
  # Their number / the seconds of the video, or of the part that is read; 0 for a
  # picture.
  rate: float


NOTHING = Selection([], [], 0.0)


def select_frames(
  timeline: Timeline, sampling: Sampling, start: float = 0.0, end: float = math.inf
) -> Selection:
  """Returns the frames of `choose_frames` with their times.

  >>> select_frames(Timeline(np.arange(30) / 10, 3.0), ByCount(6)).rate
  2.0
  """
  chosen = choose_frames(timeline, sampling, start, end)
  rate = len(chosen) / len(_find_part(timeline, start, end)) * (timeline.rate or 0.0)
  return Selection(chosen.tolist(), timeline.seconds[chosen].tolist(), rate)


def choose_frames(
  timeline: Timeline, sampling: Sampling, start: float = 0.0, end: float = math.inf
) -> Int[np.ndarray, " frames"]:
  """Returns the indices of the frames to read, in order; they may repeat.

  The part from `start` to `end` contains the frame on screen at `start`, the frame on
  screen at `end`, and all between them. The indices are those of
  `sample_frame_indices`, as in VLM-RLAIF's code, unless the rate varies so much that
  two of these frames are more than MAX_STRETCH times as far apart in time as evenly
  spaced ones. Then they are the frames on screen at evenly spaced times. A
  ByRule selects by number.

  >>> screen = Timeline(np.array([0.0, 0.1, 0.2, 0.3, 5.0, 10.0]), 10.1)
  >>> choose_frames(screen, ByCount(4)).tolist()
  [0, 3, 4, 5]

  Args:
    timeline: The frames of the video.
    sampling: The number of frames.
    start: Start of the part, in seconds.
    end: End of the part, in seconds; infinity for the end of the video.

  Raises:
    ValueError: The video has no frame, or the part is empty or outside of it.
  """
  numbers = _find_part(timeline, start, end)
  if isinstance(sampling, ByRule):
    return numbers.start + sampling.sample_frames(len(numbers), timeline.rate)
  count = _count_frames(min(end, timeline.duration) - start, sampling)
  part = timeline.seconds[numbers.start : numbers.stop]
  return numbers.start + _spread(part, count)


def _find_part(timeline: Timeline, start: float, end: float) -> range:
  """Returns the indices of the frames of a part; see choose_frames."""
  seconds, duration = timeline
  if not len(seconds):
    raise ValueError("it contains no frames")
  if end <= start:
    raise ValueError(f"its part from {start:g} s to {end:g} s is empty")
  if start > duration + CLOCK_S:
    raise ValueError(
      f"its part starts at {start:g} s, but it lasts {duration:.3f} s. Correct the "
      "start and end of the record."
    )
  first, last = (_find_on_screen(seconds, t + CLOCK_S) for t in (start, end))
  return range(int(first), int(last) + 1)


def _count_frames(duration: float, sampling: ByCount | ByFps) -> int:
  if isinstance(sampling, ByCount):
    return sampling.frames
  count = int(duration * sampling.fps + CLOCK_S)
  return max(sampling.min_frames, min(count, sampling.max_frames))


def _spread(part: Float[np.ndarray, " total"], count: int) -> Int[np.ndarray, " count"]:
  """Returns `count` indices that are evenly spaced in time; see choose_frames."""
  by_number = sample_frame_indices(len(part), count)
  span = part[-1] - part[0]
  even = np.linspace(part[0], part[-1], len(part))
  # Times less than half a frame off are those of a constant rate, rounded.
  is_constant = 2 * np.abs(part - even).max() * (len(part) - 1) <= span
  widest = np.diff(part[by_number]).max(initial=0.0)
  if is_constant or widest * (count - 1) <= MAX_STRETCH * span:
    return by_number
  return _find_on_screen(part, np.linspace(part[0], part[-1], count) + CLOCK_S / 2)


def _find_on_screen(seconds, times):
  """Returns the index of the last frame that starts at or before each time."""
  return np.maximum(np.searchsorted(seconds, times, side="right") - 1, 0)
