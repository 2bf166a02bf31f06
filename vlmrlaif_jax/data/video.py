"""Loading of videos: evenly spaced RGB frames and their times.

A video is a file, a folder of frame images, a list of frame images, an animation or one
image. The name of a file may end in the part to read, as in `clip.mp4#t=1.5,3`
(data/time_range.py).

Files of others may hang or crash a decoder, so programs read them in worker processes:
many by `read_videos` and `hash_videos`, and one by `read_video_in_worker`.
"""

import functools
import hashlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import av
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vlmrlaif_jax.data import worker_pool
from vlmrlaif_jax.data.decoding import containers, pictures, with_decord
from vlmrlaif_jax.data.decoding.files import (
  Each,
  Frame,
  MakeEach,
  ReadFrame,
  check_regular_file,
  list_images,
  open_regular_file,
)
from vlmrlaif_jax.data.decoding.sampling import (
  ByCount,
  Sampling,
  Selection,
  Timeline,
  select_frames,
)
from vlmrlaif_jax.data.decoding.sampling import ByFps as ByFps
from vlmrlaif_jax.data.decoding.sampling import (
  sample_frame_indices as sample_frame_indices,
)
from vlmrlaif_jax.data.decoding.squares import FILL, pad_and_resize
from vlmrlaif_jax.data.time_range import TimeRange, split_time_range

READING_VERSION = 2  # Increment when videos yield other frames than before.
DECODERS = {
  "pyav": containers.read_container,
  "decord": with_decord.read_with_decord,
}
# Not `-m`, which would run this module a second time, as the owner of other classes.
WORKER = (sys.executable, "-P", "-c", f"from {__name__} import serve; serve()")

TIMEOUT_S = 60.0  # Seconds to decode a video by `read_video_in_worker`.

VideoPath: TypeAlias = str | os.PathLike | Sequence[str]  # A list has frame images.


class MediaList(NamedTuple):
  """Several videos and images of one conversation, in the order of their places.

  An image is a video of one frame.
  """

  paths: tuple[VideoPath, ...]


Media: TypeAlias = VideoPath | MediaList  # The videos and images of a conversation.


class Frames(NamedTuple):
  """Frames of a video."""

  pixels: UInt8[np.ndarray, "frames height width 3"]
  seconds: Float[np.ndarray, " frames"]  # Times after the video's first frame.
  size: tuple[int, int]  # Height and width of the first frame before it was resized.
  # Their number / the seconds of the video, or of the part that is read; 0 for an
  # image.
  rate: float = 0.0


class Resizing(Protocol):
  """The rule of a model family for the size of frames."""

  def resize(
    self, frame: Frame, frames: int | None
  ) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Returns an image (None), or a frame of a video, in the size for the model."""
    ...


class Reading(NamedTuple):
  """Settings for reading a video."""

  sampling: Sampling
  square: int = 0  # Height and width that frames are padded and resized to; 0: neither.
  fill: tuple[int, ...] = FILL  # Red, green and blue of the padding.
  within: tuple[int, int] | None = None  # Largest width and height of the frames.
  decoder: str = "pyav"  # Decoder of video files, of DECODERS.
  resizing: Resizing | None = None  # Rule of the frames' size; None for their own size.

  def describe(self) -> str:
    """Returns a text that names everything that the frames of a video depend on."""
    return f"reading {READING_VERSION} {tuple(self)}"


class VideoError(Exception):
  """An unreadable video, with the reason."""

  def __init__(self, path: VideoPath, reason: str):
    self.reason = reason
    where = str(path) if isinstance(path, str | os.PathLike) else f"{path[:1]}..."
    super().__init__(f"{where}: {reason}")


def list_media(media: Media) -> tuple[VideoPath, ...]:
  """Returns the videos and images of a conversation, in order."""
  return media.paths if isinstance(media, MediaList) else (media,)


def format_video_name(path: Media) -> str:
  """Returns one string for a video: its path, or the paths of its frames.

  The names of several videos are separated by empty lines.
  """
  if isinstance(path, MediaList):
    return "\n\n".join(map(format_video_name, path.paths))
  if isinstance(path, str | os.PathLike):
    return os.fspath(path)
  return "\n".join(os.fspath(image) for image in path)


def list_files(path: VideoPath) -> list[str]:
  """Returns the files that a video consists of.

  Raises:
    OSError: There is no such file, or a folder contains no images.
  """
  if not isinstance(path, str | os.PathLike):
    return [os.fspath(image) for image in path]
  place = Path(split_time_range(os.fspath(path)).path)
  if place.is_dir():
    return [str(image) for image in list_images(place)]
  check_regular_file(place)
  return [str(place)]


def read_video(path: VideoPath, reading: Reading) -> Frames:
  """Reads the frames of a video, upright and with square pixels.

  >>> read_video("clip.mp4#t=1.5,3", Reading(ByCount(8)))  # doctest: +SKIP

  Args:
    path: The video. Only the part that its name ends in is read.
    reading: The frames to read, and their size.

  Raises:
    VideoError: The video is missing, broken or empty, its part lies outside of it, or
      its frames differ in size.
  """
  try:
    frames, chosen = _read(path, reading)
  except Exception as error:  # Decoders raise errors of any type on broken input.
    raise VideoError(path, _format_reason(error)) from error
  as_read = lambda x: x.size if reading.resizing else x.pixels.shape[:2]
  sizes = sorted({as_read(frame) for frame in frames})
  if len(sizes) > 1:
    raise VideoError(path, f"its frames differ in size (height, width): {sizes}")
  pixels = np.stack([frame.pixels for frame in frames])
  return Frames(pixels, np.array(chosen.seconds), frames[0].size, chosen.rate)


def read_videos(
  videos: Sequence[VideoPath], reading: Reading, *, workers: int, timeout_s: float
) -> Iterator[Frames | str]:
  """Yields the frames of each video in order, or the reason why there are none.

  A crash or hang of a decoder affects one video only.

  Args:
    videos: The videos.
    reading: The frames to read, and their size.
    workers: Number of processes; 0 decodes in this process, without a time limit.
    timeout_s: Seconds to decode one video.
  """
  return _answer_all([(read_video, x, reading) for x in videos], workers, timeout_s)


def hash_videos(
  videos: Sequence[VideoPath], *, workers: int, timeout_s: float
) -> Iterator[bytes | str]:
  """Yields the hash of each video, or the reason why there is none; see read_videos.

  It depends on the bytes of all files, and on the part that the name ends in.
  """
  return _answer_all([(_hash, video) for video in videos], workers, timeout_s)


def read_video_in_worker(
  path: VideoPath, reading: Reading, *, timeout_s: float = TIMEOUT_S
) -> Frames:
  """Reads the frames of a video of others; see read_video.

  The worker process stays, so that reading videos one by one starts no more processes.

  Args:
    path: The video.
    reading: The frames to read, and their size.
    timeout_s: Seconds to decode the video.

  Raises:
    VideoError: The video cannot be read, or the decoder crashes or takes too long.
  """
  return _ask(path, (read_video, path, reading), timeout_s)


def hash_video_in_worker(path: VideoPath, *, timeout_s: float = TIMEOUT_S) -> bytes:
  """Returns the hash of a video of others; see hash_videos.

  Raises:
    VideoError: A file is missing or takes too long to read.
  """
  return _ask(path, (_hash, path), timeout_s)


def decode_video(
  path: VideoPath, count: int
) -> UInt8[np.ndarray, "frames height width 3"]:
  """Returns `count` evenly spaced frames at their own size; see read_video."""
  return read_video(path, Reading(ByCount(count))).pixels


def load_frames(
  path: VideoPath, *, count: int, size: int
) -> UInt8[np.ndarray, "{count} {size} {size} 3"]:
  """Returns `count` evenly spaced frames, padded to squares and resized."""
  return read_video(path, Reading(ByCount(count), square=size)).pixels


def read_duration(path: str | os.PathLike, *, timeout_s: float = TIMEOUT_S) -> float:
  """Returns the seconds that a video file lasts by its header, read in a worker.

  Args:
    path: The file, or a part of it. A part has its own duration.
    timeout_s: Seconds to read the header.

  Raises:
    VideoError: The file is no video.
  """
  return _ask(path, (_measure, path), timeout_s)


def check_decoder(name: str) -> None:
  """Checks that a decoder of video files exists and is installed.

  Raises:
    ValueError: It does not exist, or is not installed.
  """
  if name not in DECODERS:
    raise ValueError(f"decoder must be one of {list(DECODERS)}, not {name!r}")
  if name == "decord" and importlib.util.find_spec("decord") is None:
    raise ValueError(
      "decoder is 'decord', which is not installed. Run pip install "
      "\"vlmrlaif_jax[decord]\", or set decoder to 'pyav'."
    )


def serve() -> None:
  """Reads videos for the process that started this one."""
  worker_pool.serve_requests(_answer)


@functools.cache
def _get_worker() -> worker_pool.SerialWorker:
  return worker_pool.SerialWorker(WORKER)


def _ask(path: VideoPath, request: tuple[Any, ...], timeout_s: float) -> Any:
  answer = _get_worker().ask(request, timeout_s)
  if isinstance(answer, str):
    raise VideoError(path, answer)
  return answer


def _answer_all(
  requests: list[tuple[Any, ...]], workers: int, timeout_s: float
) -> Iterator[Any]:
  if not workers:
    return map(_answer, requests)
  return worker_pool.run_workers(WORKER, requests, workers=workers, timeout_s=timeout_s)


def _answer(request: tuple[Any, ...]) -> Any:
  """Calls a function in a worker; a text is the reason why there is no result."""
  function, *arguments = request
  try:
    return function(*arguments)
  except VideoError as error:
    return error.reason
  except Exception as error:
    return _format_reason(error)


def _measure(path: VideoPath) -> float:
  """Returns the duration of a video file in its header; 0 if it is missing."""
  [file] = list_files(path)
  _, start, end = split_time_range(format_video_name(path))
  if pictures.is_picture(file):
    with pictures.open_image(file) as image:
      duration = pictures.measure_animation(image)[0].duration
  else:
    with containers.open_container(file) as container:
      containers.find_video_stream(container)
      duration = (container.duration or 0) / av.time_base
  return max(0.0, min(end, duration) - start)


def _hash(path: VideoPath) -> bytes:
  digest = hashlib.sha256()
  for name in list_files(path):
    with open_regular_file(name) as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  if isinstance(path, str | os.PathLike):
    _, *part = split_time_range(os.fspath(path))
    digest.update("{} {}".format(*part).encode() if part != [0.0, math.inf] else b"")
  return digest.digest()


def _format_reason(error: Exception) -> str:
  if isinstance(error, MemoryError):
    return "it needs more memory than a decoder may use"
  reason = error.strerror if isinstance(error, av.FFmpegError) else str(error)
  return reason or type(error).__name__


def _read(path: VideoPath, reading: Reading) -> tuple[list[ReadFrame], Selection]:
  """Returns the frames that a reading selects, by the kind of the video."""
  part = TimeRange("", 0.0, math.inf)
  if isinstance(path, str | os.PathLike):
    part = split_time_range(os.fspath(path))
  make_each = functools.partial(_make_each, reading)
  choose = lambda x: select_frames(x, reading.sampling, part.start, part.end)
  files = list_files(path)
  is_file = part.path and not os.path.isdir(part.path)
  if is_file and not pictures.is_picture(files[0]):
    return DECODERS[reading.decoder](files[0], choose, make_each)
  if is_file:
    return pictures.read_animation(files[0], choose, make_each)
  return _read_images(files, part, reading.sampling, make_each)


def _read_images(
  files: list[str], part: TimeRange, sampling: Sampling, make_each: MakeEach
) -> tuple[list[ReadFrame], Selection]:
  """Reads frame images, which have no times: they count as evenly spaced."""
  if (part.start, part.end) != (0.0, math.inf):
    raise ValueError("frame images have no times: remove start and end of the record")
  step = 1.0 if isinstance(sampling, ByCount) else 1 / sampling.fps
  duration = len(files) * step if len(files) > 1 else 0.0
  timeline = Timeline(np.arange(len(files)) * step, duration)
  chosen = select_frames(timeline, sampling, part.start, part.end)
  selected = pictures.read_images(files, chosen.numbers, make_each(chosen))
  return [selected[n] for n in chosen.numbers], chosen


def _make_each(reading: Reading, chosen: Selection) -> Each:
  """Returns the function that resizes each of the selected frames."""
  is_image = len(chosen.numbers) == 1 and not chosen.rate
  frames = None if is_image else len(chosen.numbers)
  return lambda frame: ReadFrame(_fit(reading, frames, frame), frame.shape[:2])


def _fit(
  reading: Reading, frames: int | None, frame: Frame
) -> UInt8[np.ndarray, "new_height new_width 3"]:
  """Returns a frame in the size of a reading."""
  if reading.resizing is not None:
    return reading.resizing.resize(frame, frames)
  if not reading.square and reading.within is None:
    return frame
  image = Image.fromarray(frame)
  if reading.within is not None:
    image.thumbnail(reading.within, Image.Resampling.BICUBIC)
  if reading.square:
    image = pad_and_resize(image, reading.square, reading.fill)
  return np.asarray(image)
