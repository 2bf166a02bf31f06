"""Loading of videos as evenly spaced, square RGB frames.

`load_videos` decodes many videos in worker processes. A video is a file, a folder of
frame images, a list of frame images, or one image. A file is decoded from its start to
the last required frame, because seeking to each of 50 frames is several times slower.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8
from PIL import Image

from vlmrlaif_jax.data import worker_pool

try:
  import decord
except ImportError:  # decord has wheels for x86_64 only; PyAV reads the same files.
  decord = None

FILL = (122, 116, 104)  # int(255 * CLIP's mean), so that normalized padding is near 0.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

VideoPath: TypeAlias = str | os.PathLike | Sequence[str]  # A list has frame images.
Frame: TypeAlias = UInt8[np.ndarray, "height width 3"]


class VideoError(Exception):
  """An unreadable video, with the reason."""

  def __init__(self, path: VideoPath, reason: str):
    self.reason = reason
    where = str(path) if isinstance(path, str | os.PathLike) else f"{path[:1]}..."
    super().__init__(f"{where}: {reason}")


def format_video_name(path: VideoPath) -> str:
  """Returns one string for a video: its path, or the paths of its frames."""
  if isinstance(path, str | os.PathLike):
    return os.fspath(path)
  return "\n".join(os.fspath(image) for image in path)


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


def decode_video(
  path: VideoPath, count: int
) -> UInt8[np.ndarray, "frames height width 3"]:
  """Decodes `count` evenly spaced RGB frames, rotated upright, at their own size.

  Raises:
    VideoError: The video is missing, broken or empty, or its frames differ in size.
  """
  frames = _read(path, count, each=lambda frame: frame)
  sizes = sorted({frame.shape[:2] for frame in frames})
  if len(sizes) > 1:
    raise VideoError(path, f"its frames differ in size (height, width): {sizes}")
  return np.stack(frames)


def load_frames(
  path: VideoPath, *, count: int, size: int
) -> UInt8[np.ndarray, "{count} {size} {size} 3"]:
  """Decodes `count` evenly spaced frames, padded to a square and resized.

  Args:
    path: The video.
    count: Number of frames.
    size: Height and width of the result in pixels.

  Raises:
    VideoError: The video is missing, broken or empty.
  """
  return np.stack(_read(path, count, each=lambda frame: _fit_frame(frame, size)))


def load_videos(
  videos: Sequence[VideoPath], *, count: int, size: int, workers: int, timeout_s: float
) -> Iterator[UInt8[np.ndarray, "{count} {size} {size} 3"] | str]:
  """Yields the frames of each video in order, or the reason why there are none.

  Decoders run in worker processes, so that a crash or hang affects one video only.

  Args:
    videos: The videos.
    count: Frames per video.
    size: Height and width of the frames in pixels.
    workers: Number of processes; 0 decodes in this process, without a time limit.
    timeout_s: Seconds to decode one video.
  """
  if not workers:
    yield from (_try_load_frames(video, count, size) for video in videos)
    return
  command = [sys.executable, "-m", __name__, str(count), str(size)]
  yield from worker_pool.run_workers(
    command, videos, workers=workers, timeout_s=timeout_s
  )


def _try_load_frames(
  path: VideoPath, count: int, size: int
) -> UInt8[np.ndarray, "{count} {size} {size} 3"] | str:
  try:
    return load_frames(path, count=count, size=size)
  except VideoError as error:
    return error.reason


def _fit_frame(frame: Frame, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
  height, width = frame.shape[:2]
  side = max(height, width)
  top, left = (side - height) // 2, (side - width) // 2
  square = np.full((side, side, 3), FILL, np.uint8)
  square[top : top + height, left : left + width] = frame
  image = Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(image)


def _read(
  path: VideoPath, count: int, *, each: Callable[[Frame], Frame]
) -> list[Frame]:
  """Decodes frames and applies `each` to one at a time, which bounds memory."""
  try:
    readers = _list_readers(path)
  except OSError as error:
    raise VideoError(path, str(error)) from error
  for read in readers:
    try:
      return read(count, each)
    except Exception as error:  # Decoders raise errors of any type on broken input.
      cause = error
  reason = cause.strerror if isinstance(cause, av.FFmpegError) else str(cause)
  raise VideoError(path, reason or type(cause).__name__) from cause


def _list_readers(
  path: VideoPath,
) -> list[Callable[[int, Callable[[Frame], Frame]], list[Frame]]]:
  """Returns functions of `count` and `each` that read a video, in order of preference.

  The images of a folder are sorted by number: frame_9 before frame_10.
  """
  if not isinstance(path, str | os.PathLike):
    return [functools.partial(_read_images, [Path(image) for image in path])]
  place = Path(path)
  if not place.exists():
    raise FileNotFoundError("there is no such file or folder")
  if place.is_dir():
    images = [p for p in place.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
      kinds = " ".join(IMAGE_SUFFIXES)
      raise FileNotFoundError(f"the folder contains no images ({kinds})")
    return [functools.partial(_read_images, sorted(images, key=_make_natural_key))]
  if place.suffix.lower() in IMAGE_SUFFIXES:
    return [functools.partial(_read_images, [place])]
  return [functools.partial(read, os.fspath(path)) for read in VIDEO_DECODERS]


def _make_natural_key(path: Path) -> list[tuple[int, str]]:
  """Splits a name so that digits sort as numbers: "f10" -> [(-1, "f"), (10, "")]."""
  parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
  return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]


def _read_images(
  paths: list[Path], count: int, each: Callable[[Frame], Frame]
) -> list[Frame]:
  indices = sample_frame_indices(len(paths), count)
  frames = {}
  for index in np.unique(indices):
    with Image.open(paths[index]) as image:
      frames[index] = each(np.asarray(image.convert("RGB")))
  return [frames[index] for index in indices]


def _read_decord(path: str, count: int, each: Callable[[Frame], Frame]) -> list[Frame]:
  reader = decord.VideoReader(path, num_threads=1)
  indices = sample_frame_indices(len(reader), count)
  frames, at = {}, 0
  for index in np.unique(indices).tolist():
    if index > at:
      reader.skip_frames(index - at)
    frames[index] = each(reader.next().asnumpy())
    at = index + 1
  return [frames[index] for index in indices.tolist()]


def _read_pyav(path: str, count: int, each: Callable[[Frame], Frame]) -> list[Frame]:
  with av.open(path) as container:
    if not container.streams.video:
      raise ValueError("it has no video stream")
    packets = container.demux(container.streams.video[0])
    # The frame count in a header may be missing or wrong.
    total = sum(packet.size > 0 for packet in packets)
  indices = sample_frame_indices(total, count)
  frames, decoded = _decode_frames(path, set(indices.tolist()), each)
  if not set(indices.tolist()) <= frames.keys():
    # Packets before the first key frame, or cut by an edit list, yield no frames.
    indices = sample_frame_indices(decoded, count)
    frames, _ = _decode_frames(path, set(indices.tolist()), each)
  return [frames[index] for index in indices.tolist()]


def _decode_frames(
  path: str, selected: set[int], each: Callable[[Frame], Frame]
) -> tuple[dict[int, Frame], int]:
  """Returns the selected frames, and the number of all decoded frames."""
  converter, frames, decoded = VideoReformatter(), {}, 0
  with av.open(path) as container:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # Worker processes already run in parallel.
    for index, frame in enumerate(container.decode(stream)):
      decoded = index + 1
      if index in selected:
        rgb = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        frames[index] = each(np.rot90(rgb, round(frame.rotation / 90)))
      if decoded > max(selected):
        break
  return frames, decoded


VIDEO_DECODERS = (_read_pyav,) if decord is None else (_read_decord, _read_pyav)


if __name__ == "__main__":
  _settings = int(sys.argv[1]), int(sys.argv[2])
  worker_pool.serve_requests(lambda path: _try_load_frames(path, *_settings))
