"""Reading of frames from video files by FFmpeg's libraries, through PyAV.

The packets of a file predict when its frames are on screen, so that the frames to read
are known before any is decoded. The decoded frames are compared with the prediction. If
it was wrong, the file is decoded again.
"""

import bisect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from vlmrlaif_jax.data.decoding.files import (
  MAX_PIXELS,
  Choose,
  Each,
  Frame,
  MakeEach,
  ReadFrame,
  check_regular_file,
  check_size,
)
from vlmrlaif_jax.data.decoding.pictures import flatten
from vlmrlaif_jax.data.decoding.sampling import NOTHING, Selection, Timeline

# Demuxers of video files. Playlists, which name other files, are not among them.
FORMATS = (
  "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,mpegvideo,m4v,h264,hevc,obu,ivf,mjpeg,"
  "dv,mxf,rm,nut,wtv,yuv4mpegpipe,gxf,vc1"
)
_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # They have an index.
MIN_SKIP = 64  # Frames. Fewer are decoded, because a seek costs time, too.
MAX_REORDER = 16  # Largest distance in frames between the orders of packets and times.
_FALLBACK_RATE = 25  # Frames per second of a file that has neither times nor a rate.


class FrameIndex(NamedTuple):
  """The frames of a file, by its packets."""

  timeline: Timeline
  pts: list[int]  # Times of the frames in order, in units of the file; [] if unknown.
  keys: list[int]  # Numbers of the frames at which decoding may start.


class _WrongIndexError(Exception):
  """A decoded frame is not the one that the packets predict."""


def read_container(
  path: str | os.PathLike, choose: Choose, make_each: MakeEach
) -> tuple[list[ReadFrame], Selection]:
  """Reads the selected frames of a video file.

  Args:
    path: The file.
    choose: Selects the frames to read.
    make_each: Returns what is applied to one upright RGB frame at a time, which bounds
      memory.

  Returns:
    The frames, and which they are.
  """
  index, timeline = read_index(path), None
  has_frames = len(index.timeline.seconds) > 0
  predicted = choose(index.timeline) if has_frames else NOTHING
  required, each = set(predicted.numbers), make_each(predicted)
  try:
    selected, timeline = _decode_by_seeking(path, index, required, each), index.timeline
  except (_WrongIndexError, StopIteration, av.FFmpegError):
    selected, timeline = _decode_in_order(path, index, required, each)
  chosen = choose(timeline)
  numbers = chosen.numbers
  if len(numbers) != len(predicted.numbers) or not set(numbers) <= selected.keys():
    selected, _ = _decode(path, set(numbers), make_each(chosen))
  return [selected[n] for n in numbers], chosen


def open_container(path: str | os.PathLike) -> InputContainer:
  """Opens a video file whose format is in FORMATS; nothing else is opened.

  Raises:
    ValueError: The format is another one.
  """
  check_regular_file(path)
  options = {
    "protocol_whitelist": "file",
    "format_whitelist": FORMATS,
    "max_pixels": str(MAX_PIXELS),
  }
  try:
    return av.open(f"file:{os.path.abspath(path)}", options=options)
  except av.ArgumentError as error:
    raise ValueError(f"its format is not one of those that are read: {FORMATS}") from (
      error
    )


def find_video_stream(container: InputContainer) -> VideoStream:
  """Returns the largest video stream of a file, and prepares it for decoding.

  Raises:
    ValueError: The file has no video stream, or only the picture of a cover.
  """
  if not container.streams.video:
    raise ValueError("it has no video stream")
  streams = [s for s in container.streams.video if not s.disposition & _NO_VIDEO]
  if not streams:
    raise ValueError("it has no video stream, only a cover picture")
  streams = [stream for stream in streams if stream.codec_context is not None]
  if not streams:
    raise ValueError("the codec of its video stream is unknown")
  stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
  check_size(stream.codec_context.width, stream.codec_context.height)
  stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
  stream.codec_context.thread_count = 1  # Worker processes already run in parallel.
  return stream


def read_index(path: str | os.PathLike) -> FrameIndex:
  """Reads which frames a file has, from its packets."""
  with open_container(path) as container:
    stream = find_video_stream(container)
    packets = [
      (packet.pts, packet.duration, packet.is_keyframe)
      for packet in container.demux(stream)
      if packet.size and not packet.is_discard
    ]
    timeline = _make_timeline([packet[:2] for packet in packets], stream)
    is_seekable = container.format.name in SEEKABLE_FORMATS
  ordered = sorted((pts, is_key) for pts, _, is_key in packets if pts is not None)
  pts = [pts for pts, _ in ordered]
  if not is_seekable or len(set(pts)) < len(packets):
    return FrameIndex(timeline, [], [])
  return FrameIndex(timeline, pts, [n for n, (_, key) in enumerate(ordered) if key])


def _make_timeline(
  times: Sequence[tuple[int | None, int | None]], stream: VideoStream
) -> Timeline:
  """Returns the timeline of frames from their times and durations, in file units."""
  count = len(times)
  step = 1 / float(stream.average_rate or stream.guessed_rate or _FALLBACK_RATE)
  pts = np.array([pts for pts, _ in times if pts is not None], dtype=np.int64)
  if len(pts) < count or not count or pts.min() == pts.max():
    return Timeline(np.arange(count) * step, count * step)
  order = np.argsort(pts, kind="stable")
  unit = float(stream.time_base or 0)
  if np.abs(order - np.arange(count)).max() > MAX_REORDER:  # The clock restarts.
    steps = np.diff(pts)
    steps[steps <= 0] = np.median(steps[steps > 0])
    pts = np.concatenate([[0], np.cumsum(steps)])
    order = np.arange(count)
  seconds = (pts[order] - pts[order[0]]) * unit
  last = (times[order[-1]][1] or 0) * unit or seconds[-1] / (count - 1)
  return Timeline(seconds, float(seconds[-1] + last))


def _decode_by_seeking(
  path: str | os.PathLike, index: FrameIndex, required: set[int], each: Each
) -> dict[int, ReadFrame]:
  """Returns the required frames; skips groups of frames that contain none of them.

  Raises:
    _WrongIndexError: Nothing can be skipped, or the decoded frames are others than the
      packets predict.
  """
  starts = dict.fromkeys(_list_starts(index.keys, required))
  if not starts:
    raise _WrongIndexError
  selected, position = {}, 0
  with open_container(path) as container:
    stream = find_video_stream(container)
    convert, frames = _make_converter(stream), container.decode(stream)
    for number in sorted(required):
      start = max((s for s in starts if s <= number), default=0)
      if start > position:
        container.seek(index.pts[start], stream=stream)
        frames, position = _skip_to_key(container, stream, index.pts[start]), start
      while position <= number:
        frame = next(frames)
        if frame.pts != index.pts[position]:
          raise _WrongIndexError
        position += 1
      selected[number] = each(convert(frame))
  return selected


def _list_starts(keys: list[int], required: set[int]) -> Iterator[int]:
  """Yields the numbers of the frames to seek to."""
  position = 0
  for number in sorted(required):
    key = keys[bisect.bisect_right(keys, number) - 1] if keys else 0
    if key - position >= MIN_SKIP:
      yield key
    position = number + 1


def _skip_to_key(
  container: InputContainer, stream: VideoStream, pts: int
) -> Iterator[VideoFrame]:
  """Yields the frames from a key frame on, after a seek to it.

  Frames before it on screen are omitted, because they may refer to frames before the
  seek.
  """
  frames = container.decode(stream)
  for frame in frames:
    if frame.pts is None or frame.pts > pts:
      raise _WrongIndexError
    if frame.pts == pts:
      if not frame.key_frame:
        raise _WrongIndexError
      yield frame
      yield from frames


def _decode_in_order(
  path: str | os.PathLike, index: FrameIndex, required: set[int], each: Each
) -> tuple[dict[int, ReadFrame], Timeline]:
  """Returns the required frames by number, and the timeline of the decoded frames.

  If the required frames end before the video does, so does decoding.
  """
  if required and max(required) + 1 < len(index.timeline.seconds):
    selected, timeline = _decode(path, required, each, stop=max(required) + 1)
    predicted = index.timeline.seconds[: len(timeline.seconds)]
    if len(predicted) > max(required) and np.allclose(timeline.seconds, predicted):
      return selected, index.timeline
  return _decode(path, required, each)


def _decode(
  path: str | os.PathLike, required: Iterable[int], each: Each, stop: int | None = None
) -> tuple[dict[int, ReadFrame], Timeline]:
  """Decodes a file from its start.

  Args:
    path: The file.
    required: Numbers of the frames to return.
    each: Applied to each returned frame.
    stop: Number of frames to decode; None for all.

  Returns:
    The required frames by number, and the timeline of the decoded frames.
  """
  selected, times = {}, []
  with open_container(path) as container:
    stream = find_video_stream(container)
    convert = _make_converter(stream)
    for number, frame in enumerate(container.decode(stream)):
      times.append((frame.pts, frame.duration))
      if number in required:
        selected[number] = each(convert(frame))
      if len(times) == stop:
        break
    return selected, _make_timeline(times, stream)


def _make_converter(stream: VideoStream) -> Callable[[VideoFrame], Frame]:
  """Returns a function from a decoded frame to RGB as players show it."""
  reformatter = VideoReformatter()
  aspect = stream.sample_aspect_ratio or Fraction(1)

  def convert(frame: VideoFrame) -> Frame:
    width = max(1, round(frame.width * aspect))
    check_size(width, frame.height)
    has_alpha = any(part.is_alpha for part in frame.format.components)
    rgb = reformatter.reformat(
      frame,
      width=width,
      format="rgba" if has_alpha or frame.format.has_palette else "rgb24",
      interpolation=None if width == frame.width else "BICUBIC",
      threads=1,
    ).to_ndarray()
    if rgb.shape[-1] == 4:
      rgb = np.asarray(flatten(Image.fromarray(rgb)))
    return _turn_upright(rgb, frame)

  return convert


def _turn_upright(
  rgb: Frame, frame: VideoFrame
) -> UInt8[np.ndarray, "new_height new_width 3"]:
  """Applies the rotation and the mirroring that a file prescribes for its frames."""
  matrix = frame.side_data.get("DISPLAYMATRIX")
  if matrix is None:
    return rgb
  # A point (x, y) is shown at (a x + c y, b x + d y).
  a, b, _, c, d = np.frombuffer(cast(Any, matrix), np.int32)[:5]
  if abs(a) + abs(d) < abs(b) + abs(c):
    rgb, a, d = rgb.transpose(1, 0, 2), c, b
  return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
