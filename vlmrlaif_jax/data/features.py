"""A store of frozen vision features on disk, so that each video is encoded once.

`build_feature_store` decodes and encodes the videos that the store does not have. The
name of a file is a hash of everything its features depend on: the content of the video,
the weights of the encoder, and how frames are read.

Several runs, processes and hosts may use one folder concurrently. Each file is replaced
atomically, and every writer of a file writes the same features. In the worst case, two
processes encode the same video.
"""

import contextlib
import hashlib
import itertools
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16

from vlmrlaif_jax.core.errors import ResumableError
from vlmrlaif_jax.core.files import open_replacing, read_json, write_json
from vlmrlaif_jax.core.prefetch import prefetch
from vlmrlaif_jax.core.types import Phase, ignore_phase
from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.processors.interface import (
  Grid,
  ProcessedVideo,
  Processor,
  Visual,
  mark_several,
  process_frames,
)
from vlmrlaif_jax.data.video import (
  Media,
  MediaList,
  VideoPath,
  format_video_name,
  list_media,
)

# Maps videos to the features of each, by temporal patch.
Encode = Callable[[Sequence[ProcessedVideo]], Sequence[Float[np.ndarray, "..."]]]
# Maps features of temporal patches to those of a prompt; see Processor.arrange.
Arrange = Callable[[Float[np.ndarray, "..."], Visual], Float[np.ndarray, "..."]]
# Maps a function to its results in all processes. Every process must call it.
Share = Callable[[Callable[[], Any]], list[Any]]
# Features and layout of each video, or the reason why it has none, by
# format_video_name.
EncodedVideos = dict[str, tuple[Float16[np.ndarray, "..."], Visual] | str]
GB = 1e9  # Bytes.
# Files of `open_replacing`, by names of `_name_files`.
UNFINISHED = re.compile(r"[0-9a-f]{32}\.(npy|json)\.[0-9a-f]{32}\.tmp")
STALE_S = 24 * 3600  # Seconds after which an unfinished file is removed.
TRAILER_MARK = b"crc32"  # Precedes the checksum after the array of a file.
PROGRESS_EVERY = 512  # Videos between two lines of progress.


class FeatureStore(NamedTuple):
  """Features by video, on disk, and in memory up to a limit.

  The keys of all fields are names by format_video_name. Files contain the features of
  temporal patches, so that a part of a video can be read. Methods also take several
  videos and images of one conversation.
  """

  files: dict[str, pathlib.Path]  # File of each video with features.
  layouts: dict[str, Visual]  # Grid and times of each video with features.
  failures: dict[str, str]  # Reason why a video has no features.
  cached: dict[str, np.ndarray]  # Features in memory.
  memory: float = 0.0  # Largest size of `cached` in bytes.
  # Tokens that the features of a conversation are padded to, if videos have different
  # numbers; or 0.
  length: int = 0
  arrange: Arrange = lambda features, visual: features  # Processor.arrange.
  # Videos whose checksum was compared; None compares none.
  verified: set[str] | None = None

  def has(self, media: Media) -> bool:
    """Returns whether all videos have features."""
    return all(format_video_name(path) in self.files for path in list_media(media))

  def get_failure(self, media: Media) -> str:
    """Returns the reason why the first unreadable video has no features."""
    names = map(format_video_name, list_media(media))
    return next(self.failures[name] for name in names if name not in self.files)

  def get_layout(self, path: VideoPath) -> Visual:
    """Returns the grid and the times of a video."""
    return self.layouts[format_video_name(path)]

  def digest(self, media: Media) -> str:
    """Returns the hash that identifies the content and the features of videos."""
    stems = [self.files[format_video_name(path)].stem for path in list_media(media)]
    if not isinstance(media, MediaList):
      return stems[0]
    return hashlib.sha256(" ".join(stems).encode()).hexdigest()[:32]

  def get(
    self, media: Media, start: int = 0, stop: int | None = None
  ) -> Float[np.ndarray, "..."]:
    """Returns the features of a conversation's videos in float16, in order.

    Args:
      media: One video, or several videos and images.
      start: First temporal patch of each video.
      stop: Temporal patch after the last one; None for all.
    """
    paths = list_media(media)
    layouts = mark_several([self.get_layout(x).select(start, stop) for x in paths])
    parts = [
      self.arrange(self._load(path)[start:stop], layout)
      for path, layout in zip(paths, layouts, strict=True)
    ]
    feature = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if self.length:
      more = [(0, self.length - len(feature)), *[(0, 0)] * (feature.ndim - 1)]
      feature = np.pad(feature, more)
    return feature

  def _load(self, path: VideoPath) -> Float[np.ndarray, "..."]:
    """Returns the features of a whole video.

    Keeps the first features that fit in memory and never evicts: with a shuffled full
    pass per epoch, evicting the least recently used would have a lower hit rate. The
    other features are mapped from disk.
    """
    name = format_video_name(path)
    if name in self.cached:
      return self.cached[name]
    feature = np.load(self.files[name], mmap_mode="r")
    if self.verified is not None and name not in self.verified:
      _verify(self.files[name], feature)
      self.verified.add(name)
    if (len(self.cached) + 1) * feature.nbytes <= self.memory:
      self.cached[name] = feature = np.array(feature)
    return feature

  def stack(self, rows: Iterable[Media]) -> Float16[np.ndarray, "batch ..."]:
    """Returns the features of a batch of conversations."""
    return np.stack([self.get(media) for media in rows])


def build_feature_store(
  paths: Sequence[VideoPath],
  folder: pathlib.Path,
  *,
  encoder: str,
  encode: Encode,
  processor: Processor,
  batch: int,
  workers: int,
  timeout_s: float,
  decoder: str = "pyav",
  memory_gb: float = 8.0,
  note: Callable[[str], None] = print,
  check: Callable[[], None] = lambda: None,
  share: Share = lambda make: [make()],
  phase: Phase = ignore_phase,
) -> FeatureStore:
  """Encodes the videos whose features are not on disk yet.

  Decoding, encoding and writing run concurrently.

  Args:
    paths: Videos of this process.
    folder: Folder of the features.
    encoder: Name of the encoder's weights.
    encode: Maps at most `batch` videos to features; called in another thread.
    processor: Processor of the model's family.
    batch: Videos encoded together.
    workers: Processes that decode; see video.read_videos.
    timeout_s: Seconds to decode one video.
    decoder: Decoder of video files, of video.DECODERS.
    memory_gb: Largest size of the features in memory, in GB.
    note: Receives lines of progress.
    check: Called after each batch, equally often in all processes. It may raise.
    share: See Share; the default is for a single process.
    phase: Measures "decode video", the wait of the encoder, and "encode".

  Returns:
    A store with the features of the readable videos, and the failures of the others.
  """
  _remove_stale(folder)
  named = {format_video_name(path): path for path in paths}
  reading = processor.make_reading(decoder)
  hashes = video.hash_videos(list(named.values()), workers=workers, timeout_s=timeout_s)
  encoding = f"{encoder} {reading.describe()}"
  files, failures = _name_files(zip(named, hashes, strict=True), folder, encoding)
  layouts = _read_layouts(files, processor, note)
  todo = {name: named[name] for name in files if name not in layouts}
  frames = video.read_videos(
    list(todo.values()), reading, workers=workers, timeout_s=timeout_s
  )
  decoded = prefetch(zip(todo, frames, strict=True), depth=2 * batch)
  encoded = prefetch(_encode_batches(decoded, encode, processor, batch, phase))
  parts = _wait_for_others(encoded, -(-len(todo) // batch), share)
  written, unreadable = _write_all(parts, files, processor, len(todo), check, note)
  layouts, failures = layouts | written, failures | unreadable
  files = {name: path for name, path in files.items() if name in layouts}
  return FeatureStore(
    files, layouts, failures, {}, memory_gb * GB, 0, processor.arrange, set()
  )


def _wait_for_others(
  parts: Iterator[EncodedVideos], batches: int, share: Share
) -> Iterator[EncodedVideos]:
  """Yields all batches, then empty ones while other processes encode more batches."""
  idle = max(share(lambda: batches)) - batches
  return itertools.chain(parts, itertools.repeat({}, idle))


def _write_all(
  parts: Iterable[EncodedVideos],
  files: dict[str, pathlib.Path],
  processor: Processor,
  total: int,
  check: Callable[[], None],
  note: Callable[[str], None],
) -> tuple[dict[str, Visual], dict[str, str]]:
  """Writes the features of each batch; returns layouts, and why a video has none."""
  layouts, failures, done = {}, {}, 0
  for part in parts:
    for name, result in part.items():
      if isinstance(result, str):
        failures[name] = result
        continue
      feature, layout = result
      if layout != processor.layout:
        write_json(files[name].with_suffix(".json"), layout._asdict())
      with open_replacing(files[name]) as file:
        np.save(file, feature)
        file.write(_compute_trailer(feature))
      layouts[name] = layout
    check()
    before, done = done, done + len(part)
    if done // PROGRESS_EVERY > before // PROGRESS_EVERY:
      note(f"features: {done}/{total} videos")
  return layouts, failures


def _name_files(
  hashes: Iterable[tuple[str, bytes | str]], folder: pathlib.Path, encoding: str
) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
  """Returns the file of each video, and the reasons why others cannot be read."""
  files, failures = {}, {}
  for name, content in hashes:
    if isinstance(content, str):
      failures[name] = content
      continue
    key = hashlib.sha256(f"{content.hex()} {encoding}".encode()).hexdigest()[:32]
    files[name] = folder / f"{key}.npy"
  return files, failures


def _read_layouts(
  files: dict[str, pathlib.Path], processor: Processor, note: Callable[[str], None]
) -> dict[str, Visual]:
  """Returns the layouts of the videos whose features are on disk."""
  read = lambda file: _read_layout(file, processor, note)
  layouts = {name: layout for name in files if (layout := read(files[name]))}
  if todo := len(files) - len(layouts):
    note(f"features: decoding and encoding {todo} of {len(files)} videos")
  return layouts


def _read_layout(
  file: pathlib.Path, processor: Processor, note: Callable[[str], None]
) -> Visual | None:
  """Returns the layout of a file of features; None if it is missing or damaged.

  The layout is next to the features unless it is that of all videos.
  """
  try:
    _read_trailer(file, np.load(file, mmap_mode="r"))
    if processor.layout is not None:
      return processor.layout
    return parse_layout(read_json(file.with_suffix(".json")))
  except FileNotFoundError:
    return None
  except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
    note(f"features: {file} cannot be read ({error}): encoding it again")
    return None


def _compute_trailer(feature: Float[np.ndarray, "..."]) -> bytes:
  """Returns the bytes after an array in its file: a mark and a checksum."""
  checksum = zlib.crc32(np.ascontiguousarray(feature).view(np.uint8).data)
  return TRAILER_MARK + checksum.to_bytes(4, "little")


def _read_trailer(file: pathlib.Path, feature: np.ndarray) -> bytes:
  """Returns the bytes after an array in its file; b"" in files of earlier versions.

  Raises:
    ValueError: The file has another length.
  """
  if not isinstance(feature, np.memmap):
    raise ValueError("the array is empty")
  with file.open("rb") as stream:
    stream.seek(feature.offset + feature.nbytes)
    trailer = stream.read()
  if len(trailer) not in (0, len(TRAILER_MARK) + 4):
    raise ValueError(f"{len(trailer)} bytes after the array")
  return trailer


def _verify(file: pathlib.Path, feature: Float[np.ndarray, "..."]) -> None:
  """Compares features with their checksum, and removes the file if they differ.

  Raises:
    ResumableError: The features differ.
  """
  trailer = _read_trailer(file, feature)
  if trailer and trailer != _compute_trailer(feature):
    file.unlink(missing_ok=True)
    raise ResumableError(
      f"the features {file} were damaged on disk (the checksum differs) and are "
      "removed: the same command encodes the video again and resumes"
    )


def parse_layout(value: Mapping[str, Any]) -> Visual:
  """Returns a layout from the fields that JSON has of it."""
  seconds, size = tuple(value["seconds"]), tuple(value["size"])
  return Visual(Grid(*value["grid"]), seconds, value["rate"], size)


def _encode_batches(
  decoded: Iterator[tuple[str, video.Frames | str]],
  encode: Encode,
  processor: Processor,
  batch: int,
  phase: Phase,
) -> Iterator[EncodedVideos]:
  """Yields the features of each batch."""
  while True:
    with phase("decode video"):
      part = {
        name: _process(processor, frames)
        for name, frames in itertools.islice(decoded, batch)
      }
    if not part:
      return
    videos = {name: x for name, x in part.items() if not isinstance(x, str)}
    encoded: EncodedVideos = {n: x for n, x in part.items() if isinstance(x, str)}
    if videos:
      with phase("encode"):
        features = encode([pixels for pixels, _ in videos.values()])
      for (name, (_, layout)), each in zip(videos.items(), features, strict=True):
        encoded[name] = each.astype(np.float16), layout
    yield encoded


def _process(
  processor: Processor, frames: video.Frames | str
) -> tuple[ProcessedVideo, Visual] | str:
  """Returns the pixels and the layout of a video, or the reason why it has none."""
  if isinstance(frames, str):
    return frames
  try:
    return process_frames(processor, frames)
  except ValueError as error:
    return str(error)


def _remove_stale(folder: pathlib.Path) -> None:
  """Creates the folder and removes unfinished files of killed processes alone."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in filter(lambda file: UNFINISHED.fullmatch(file.name), folder.iterdir()):
    with contextlib.suppress(FileNotFoundError):  # Another run may remove it first.
      if time.time() - file.stat().st_mtime > STALE_S:
        file.unlink()
