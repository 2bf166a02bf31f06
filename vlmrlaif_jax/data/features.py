"""Frozen vision features on disk: every video is decoded once and encoded once.

A file is named for what its features depend on: the video's content, the encoder's
weights, and which frames were taken at which size. Change one and it is made anew.

Several runs, processes and hosts may use one folder at a time. A file appears whole or
not at all, and whoever makes it makes the same; at worst one was made twice.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, UInt8

from vlmrlaif_jax.core.prefetch import ahead
from vlmrlaif_jax.core.types import Phase, untimed
from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.video import VideoPath

Encode = Callable[
  [UInt8[np.ndarray, "batch frames height width 3"]],
  Float[np.ndarray, "batch frames patches channels"],
]
# From what makes something to what it made in each process; all are to call it.
Share = Callable[[Callable[[], Any]], list[Any]]
Encoded = dict[str, Float16[np.ndarray, "frames patches channels"]]  # By name_of.
GB = 1e9  # Bytes.
HEADER = 128  # Bytes of an .npy file before its numbers.
# Seconds since its last use that another run's file stays, whatever the limit: one that
# is in use is read at least once in so long.
IN_USE_S = 24 * 3600
TOLD_EVERY = 512  # Videos.


class Store(NamedTuple):
  """Features by video, on disk, and in memory as far as that goes."""

  files: dict[str, pathlib.Path]  # By name_of(video).
  failures: dict[str, str]  # Why a video has none.
  kept: dict[str, np.ndarray]
  memory: float = 0.0  # Bytes that `kept` may take.

  def has(self, path: VideoPath) -> bool:
    return name_of(path) in self.files

  def get(self, path: VideoPath) -> Float[np.ndarray, "frames patches channels"]:
    """The features of a video, in float16.

    What does not fit in memory is mapped from disk. The first stay: every epoch reads
    all, in another order, so that to drop the oldest would find fewer.
    """
    name = name_of(path)
    if name in self.kept:
      return self.kept[name]
    feature = _mapped(self.files[name])
    _touch(self.files[name])
    if (len(self.kept) + 1) * feature.nbytes <= self.memory:
      self.kept[name] = feature = np.array(feature)
    return feature


def _mapped(file: pathlib.Path) -> Float16[np.ndarray, "frames patches channels"]:
  try:
    return np.load(file, mmap_mode="r")
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"the features {file} were removed while in use: start the same command again, "
      "which makes them anew, and raise data.features_limit_gb of the runs that share "
      "the folder"
    ) from error


def name_of(path: VideoPath) -> str:
  """One string for a video, be it a file, a folder or a list of frames."""
  return str(path) if isinstance(path, str | os.PathLike) else "\n".join(path)


def build(
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
  limit_gb: float = 0.0,
  memory_gb: float = 8.0,
  note: Callable[[str], None] = print,
  check: Callable[[], None] = lambda: None,
  share: Share = lambda make: [make()],
  phase: Phase = untimed,
) -> Store:
  """Encodes the videos whose features are not on disk yet.

  Decoding, encoding and writing go on at the same time, each a little ahead. The run's
  videos are those of all processes.

  Args:
    encoder: names the encoder's weights.
    encode: pixels of `batch` videos -> their features; called in another thread.
    count, size: frames of each video, and their side in pixels.
    batch: videos encoded at once; one shape, one compilation.
    workers, timeout_s: see video.load_many.
    limit_gb: of the folder; what was not used for longest is removed, but nothing of
      the run's. 0: none.
    memory_gb: that the features of the store may take.
    check: called after each batch, in all processes equally often; it may raise.
    share: see Share; by default there is one process.
    phase: books "decode video", what the encoder waits for, and "encode".

  Raises:
    ValueError: the run's videos alone would exceed the limit.
  """
  _clean(folder)
  files, failures = _named(paths, folder, f"{encoder} {count} {size}")
  todo = _missing(paths, files, note)
  own, more = _of_all(share, folder, files, -(-len(todo) // batch))
  frames = video.load_each(
    list(todo.values()), count=count, size=size, workers=workers, timeout_s=timeout_s
  )
  decoded = ahead(zip(todo, frames, strict=True), depth=2 * batch)
  made = ahead(_encoded(decoded, encode, batch, phase))
  parts = itertools.chain(made, itertools.repeat(({}, {}), more))
  make = functools.partial(_make_room, folder, own, limit_gb * GB, note)
  room = functools.partial(_room_of_all, share, make) if limit_gb else lambda some: True
  failures |= _write_all(parts, files, len(todo), room, check, note)
  files = {name: path for name, path in files.items() if name not in failures}
  room([_mapped(file) for file in list(files.values())[:1]])  # Others may have written.
  return Store(files, failures, {}, memory_gb * GB)


def _write_all(
  parts: Iterator[tuple[Encoded, dict[str, str]]],
  files: dict[str, pathlib.Path],
  total: int,
  room: Callable[[Sequence[np.ndarray]], bool],
  check: Callable[[], None],
  note: Callable[[str], None],
) -> dict[str, str]:
  """Writes features as they are encoded; returns why some videos have none.

  Args:
    total: videos, those without features included.
    room: see _room_of_all.
  """
  failures, done, bounded = {}, 0, False
  for part, failed in parts:
    failures |= failed
    bounded = bounded or room(list(part.values()))
    for name, feature in part.items():
      _write(files[name], feature)
    check()
    before, done = done, done + len(part) + len(failed)
    if done // TOLD_EVERY > before // TOLD_EVERY:
      note(f"features: {done}/{total} videos")
  return failures


def _of_all(
  share: Share, folder: pathlib.Path, files: dict[str, pathlib.Path], batches: int
) -> tuple[set[pathlib.Path], int]:
  """(the files of all processes' videos, how many batches more than this one the one
  encodes that has most to do)."""
  own = {"files": [file.name for file in files.values()], "batches": batches}
  every = share(lambda: own)
  names = {folder / name for told in every for name in told["files"]}
  return names, max(told["batches"] for told in every) - batches


def _room_of_all(
  share: Share, make: Callable[[int], None], some: Sequence[np.ndarray]
) -> bool:
  """Makes room for the files of all processes, once one knows how large they are.

  All do the same, lest one write before there is room.

  Args:
    make: takes the bytes of a file.
    some: features that this process has; those of all videos are as large.
  """
  size = max(share(lambda: max((x.nbytes for x in some), default=0)))
  if size:
    share(lambda: make(size + HEADER))
  return size > 0


def _named(
  paths: Sequence[VideoPath], folder: pathlib.Path, how: str
) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
  """(the file of each video, failures of those that cannot be read), by name_of."""
  files, failures = {}, {}
  for path in paths:
    try:
      key = hashlib.sha256(f"{content(path)} {how}".encode()).hexdigest()[:32]
      files[name_of(path)] = folder / f"{key}.npy"
    except OSError as error:
      failures[name_of(path)] = str(error)
  return files, failures


def _missing(
  paths: Sequence[VideoPath],
  files: dict[str, pathlib.Path],
  note: Callable[[str], None],
) -> dict[str, VideoPath]:
  """The videos whose features are not there, by name_of; the others' are in use."""
  todo = {
    name: path
    for name, path in {name_of(path): path for path in paths}.items()
    if name in files and not _is_whole(files[name], note)
  }
  for name in files.keys() - todo.keys():
    _touch(files[name])
  if todo:
    note(f"features: decoding and encoding {len(todo)} of {len(files)} videos")
  return todo


def _is_whole(file: pathlib.Path, note: Callable[[str], None]) -> bool:
  """Whether features are there; those that cannot be read are told of."""
  try:
    np.load(file, mmap_mode="r")
    return True
  except FileNotFoundError:
    return False
  except (OSError, EOFError, ValueError) as error:
    note(f"features: {file} cannot be read ({error}) and is made anew")
    return False


def _encoded(
  decoded: Iterator[tuple[str, np.ndarray | str]],
  encode: Encode,
  batch: int,
  phase: Phase,
) -> Iterator[tuple[Encoded, dict[str, str]]]:
  """(features, failures) of the videos, some at a time; the encoder sees one shape."""
  while True:
    with phase("decode video"):
      part = dict(itertools.islice(decoded, batch))
    if not part:
      return
    failed = {name: x for name, x in part.items() if isinstance(x, str)}
    names = [name for name in part if name not in failed]
    made = []
    if names:
      pixels = np.stack([part[name] for name in names])
      fill = np.zeros((batch - len(names), *pixels.shape[1:]), pixels.dtype)
      with phase("encode"):
        made = encode(np.concatenate([pixels, fill]))[: len(names)].astype(np.float16)
    yield dict(zip(names, made, strict=True)), failed


def _write(file: pathlib.Path, feature: np.ndarray) -> None:
  """Whole or not at all, also beside other hosts that write the same."""
  unfinished = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
  with open(unfinished, "wb") as stream:
    np.save(stream, feature)
  unfinished.replace(file)


def _touch(file: pathlib.Path) -> None:
  """Says that it is in use; a folder that is only to be read will do without."""
  with contextlib.suppress(OSError):
    os.utime(file)


def _clean(folder: pathlib.Path) -> None:
  """A folder without what processes left that were killed while they wrote."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in folder.glob("*.tmp"):
    with contextlib.suppress(FileNotFoundError):
      if time.time() - file.stat().st_mtime > IN_USE_S:
        file.unlink()


def _make_room(
  folder: pathlib.Path,
  own: set[pathlib.Path],
  limit: float,
  note: Callable[[str], None],
  each: int,
) -> None:
  """Removes the features that were not used for longest, until all of `own` fit.

  Args:
    own: those of this run, in all its processes, there or not yet; they stay.
    limit: bytes.
    each: bytes of one of them.
  """
  excess = len(own) * each - limit
  if excess > 0:
    raise ValueError(
      f"the features of this run's {len(own)} videos take {len(own) * each / GB:.3g} "
      f"GB, more than data.features_limit_gb={limit / GB:g}: raise it, or lower "
      "model.frames"
    )
  others = []
  for file in folder.glob("*.npy"):
    with contextlib.suppress(FileNotFoundError):  # Another run makes room, too.
      if file not in own:
        others.append((file.stat().st_mtime, file.stat().st_size, file))
  excess += sum(size for _, size, _ in others)
  for used, size, file in sorted(others):
    if excess <= 0:
      return
    if time.time() - used < IN_USE_S:
      note(
        f"features: {folder} is {excess / GB:.3g} GB above data.features_limit_gb="
        f"{limit / GB:g}, for other runs used the rest within a day"
      )
      return
    file.unlink(missing_ok=True)
    excess -= size


def content(path: VideoPath) -> str:
  """A hash of a video's bytes, or of those of all its frames."""
  digest = hashlib.sha256()
  for file in _files(path):
    with open(file, "rb") as stream:
      digest.update(hashlib.file_digest(stream, "sha256").digest())
  return digest.hexdigest()


def _files(path: VideoPath) -> list[str]:
  if not isinstance(path, str | os.PathLike):
    return list(path)
  if os.path.isdir(path):
    return sorted(str(file) for file in pathlib.Path(path).iterdir() if file.is_file())
  return [str(path)]
