"""Frozen vision features on disk: every video is decoded once and encoded once.

The name of a file is a hash of everything its features depend on: the content of the
video, the weights of the encoder, the number of frames and their size.

Several runs, processes and hosts may use one folder at the same time. Each file is
replaced atomically, and every writer of a file writes the same features. At worst, two
processes encode the same video.
"""

import contextlib
import hashlib
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, UInt8

from vlmrlaif_jax.core.files import open_replacing
from vlmrlaif_jax.core.prefetch import prefetch
from vlmrlaif_jax.core.types import Phase, ignore_phase
from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.video import VideoPath, format_video_name

Encode = Callable[
  [UInt8[np.ndarray, "batch frames height width 3"]],
  Float[np.ndarray, "batch frames patches channels"],
]
# Maps a function to its results in all processes. Every process must call it.
Share = Callable[[Callable[[], Any]], list[Any]]
# By name_of: the features of a video, or the reason why there are none.
EncodedVideos = dict[str, Float16[np.ndarray, "frames patches channels"] | str]
GB = 1e9  # Bytes.
STALE_S = 24 * 3600  # Seconds after which an unfinished file is removed.
PROGRESS_EVERY = 512  # Videos between two lines of progress.


class FeatureStore(NamedTuple):
  """Features by video, on disk, and in memory up to a limit."""

  files: dict[str, pathlib.Path]  # File of each video, by name_of(video).
  failures: dict[str, str]  # Reason why a video has no features, by name_of(video).
  cached: dict[str, np.ndarray]  # Features held in memory, by name_of(video).
  memory: float = 0.0  # Largest size of `cached` in bytes.

  def has(self, path: VideoPath) -> bool:
    """Returns whether the video has features."""
    return format_video_name(path) in self.files

  def digest(self, path: VideoPath) -> str:
    """Returns a name of the features, which depends on what the video shows."""
    return self.files[format_video_name(path)].stem

  def get(self, path: VideoPath) -> Float[np.ndarray, "frames patches channels"]:
    """Returns the features of a video in float16.

    Keeps the first features that fit in memory and never evicts: with a shuffled full
    pass per epoch, evicting the least recently used would have a lower hit rate. The
    other features are mapped from disk.
    """
    name = format_video_name(path)
    if name in self.cached:
      return self.cached[name]
    feature = np.load(self.files[name], mmap_mode="r")
    if (len(self.cached) + 1) * feature.nbytes <= self.memory:
      self.cached[name] = feature = np.array(feature)
    return feature

  def stack(
    self, videos: Iterable[VideoPath]
  ) -> Float16[np.ndarray, "batch frames patches channels"]:
    """Returns the features of a batch of videos."""
    return np.stack([self.get(video) for video in videos])


def build_feature_store(
  paths: Sequence[VideoPath],
  folder: pathlib.Path,
  *,
  encoder: str,
  encode: Encode,
  count: int,
  size: int,
  batch: int,
  workers: int,
  timeout_s: float,
  memory_gb: float = 8.0,
  note: Callable[[str], None] = print,
  check: Callable[[], None] = lambda: None,
  share: Share = lambda make: [make()],
  phase: Phase = ignore_phase,
) -> FeatureStore:
  """Encodes the videos whose features are not on disk yet.

  Decodes, encodes and writes concurrently, each a little ahead of the next.

  Args:
    paths: videos of this process.
    folder: directory of the features.
    encoder: name of the encoder's weights.
    encode: from the pixels of `batch` videos to their features, in another thread.
    count: frames per video.
    size: height and width of the frames in pixels.
    batch: videos encoded together; a constant shape, so that JAX compiles once.
    workers: processes that decode; see video.load_each.
    timeout_s: seconds to decode one video.
    memory_gb: largest size of the features that the store holds in memory.
    note: receives lines of progress.
    check: called after each batch, equally often in all processes. It may raise.
    share: see Share; the default is for a single process.
    phase: times "decode video", which is the encoder's wait, and "encode".

  Returns:
    The features of the videos that could be read, and why the others could not.
  """
  _remove_stale(folder)
  named = {format_video_name(path): path for path in paths}
  files, failures = _named(named, folder, f"{encoder} {count} {size}")
  todo = {name: named[name] for name in files if not _is_whole(files[name], note)}
  if todo:
    note(f"features: decoding and encoding {len(todo)} of {len(files)} videos")
  frames = video.load_videos(
    list(todo.values()), count=count, size=size, workers=workers, timeout_s=timeout_s
  )
  decoded = prefetch(zip(todo, frames, strict=True), depth=2 * batch)
  made = prefetch(_encoded(decoded, encode, batch, phase))
  batches = -(-len(todo) // batch)
  idle = max(share(lambda: batches)) - batches  # Others have more batches to encode.
  parts = itertools.chain(made, itertools.repeat({}, idle))
  failures |= _write_all(parts, files, len(todo), check, note)
  files = {name: path for name, path in files.items() if name not in failures}
  return FeatureStore(files, failures, {}, memory_gb * GB)


def _write_all(
  parts: Iterable[EncodedVideos],
  files: dict[str, pathlib.Path],
  total: int,
  check: Callable[[], None],
  note: Callable[[str], None],
) -> dict[str, str]:
  """Writes the features of each batch, and returns why some videos have none."""
  failures: dict[str, str] = {}
  done = 0
  for part in parts:
    for name, made in part.items():
      if isinstance(made, str):
        failures[name] = made
        continue
      with open_replacing(files[name]) as file:
        np.save(file, made)
    check()
    before, done = done, done + len(part)
    if done // PROGRESS_EVERY > before // PROGRESS_EVERY:
      note(f"features: {done}/{total} videos")
  return failures


def _named(
  named: dict[str, VideoPath], folder: pathlib.Path, how: str
) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
  """Returns the file of each video, and why others cannot be read, by name_of."""
  files, failures = {}, {}
  for name, path in named.items():
    try:
      key = hashlib.sha256(f"{hash_video(path)} {how}".encode()).hexdigest()[:32]
      files[name] = folder / f"{key}.npy"
    except OSError as error:
      failures[name] = str(error)
  return files, failures


def _is_whole(file: pathlib.Path, note: Callable[[str], None]) -> bool:
  """Returns whether a file of features is complete; reports one that is damaged."""
  try:
    np.load(file, mmap_mode="r")
    return True
  except FileNotFoundError:
    return False
  except (OSError, EOFError, ValueError) as error:
    note(f"features: {file} cannot be read ({error}): encoding it again")
    return False


def _encoded(
  decoded: Iterator[tuple[str, np.ndarray | str]],
  encode: Encode,
  batch: int,
  phase: Phase,
) -> Iterator[EncodedVideos]:
  """Yields what each batch is encoded to, padded to one shape."""
  while True:
    with phase("decode video"):
      part = dict(itertools.islice(decoded, batch))
    if not part:
      return
    frames = {name: x for name, x in part.items() if not isinstance(x, str)}
    if frames:
      pixels = np.stack(list(frames.values()))
      fill = np.zeros((batch - len(pixels), *pixels.shape[1:]), pixels.dtype)
      with phase("encode"):
        made = encode(np.concatenate([pixels, fill]))[: len(pixels)].astype(np.float16)
      part |= zip(frames, made, strict=True)
    yield part


def _remove_stale(folder: pathlib.Path) -> None:
  """Creates the folder, or removes what killed processes left unfinished in it."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in folder.glob("*.tmp"):
    with contextlib.suppress(FileNotFoundError):  # Another run removes it, too.
      if time.time() - file.stat().st_mtime > STALE_S:
        file.unlink()


def hash_video(path: VideoPath) -> str:
  """Hashes the bytes of a video, or of all its frames."""
  if not isinstance(path, str | os.PathLike):
    files = list(path)
  elif os.path.isdir(path):
    files = sorted(str(f) for f in pathlib.Path(path).iterdir() if f.is_file())
  else:
    files = [str(path)]
  digest = hashlib.sha256()
  for file in files:
    with open(file, "rb") as stream:
      digest.update(hashlib.file_digest(stream, "sha256").digest())
  return digest.hexdigest()
