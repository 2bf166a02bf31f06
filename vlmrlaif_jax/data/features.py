"""Frozen vision features on disk: every video is decoded once and encoded once.

A file is named for what its features depend on: the video's content, the encoder's
weights, and which frames were taken at which size. Change one and it is made anew.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.video import VideoPath

Encode = Callable[
  [UInt8[np.ndarray, "batch frames height width 3"]],
  Float[np.ndarray, "batch frames patches channels"],
]


class Store(NamedTuple):
  """Features by video, read from disk once and kept."""

  files: dict[str, pathlib.Path]  # By name_of(video).
  failures: dict[str, str]  # Why a video has none.
  kept: dict[str, np.ndarray]

  def has(self, path: VideoPath) -> bool:
    return name_of(path) in self.files

  def get(self, path: VideoPath) -> Float[np.ndarray, "frames patches channels"]:
    """The features of a video, in float16."""
    name = name_of(path)
    if name not in self.kept:
      self.kept[name] = np.load(self.files[name])
    return self.kept[name]


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
  note: Callable[[str], None] = print,
) -> Store:
  """Encodes the videos whose features are not on disk yet.

  Args:
    encoder: names the encoder's weights.
    encode: pixels of `batch` videos -> their features.
    count: frames of each video.
    size: side of each frame, in pixels.
    batch: videos encoded at once; one shape, one compilation.
    workers, timeout_s: see video.load_many.
  """
  folder.mkdir(parents=True, exist_ok=True)
  files, failures, todo = {}, {}, {}
  for path in paths:
    name = name_of(path)
    try:
      key = hashlib.sha256(
        f"{content(path)} {encoder} {count} {size}".encode()
      ).hexdigest()[:32]
    except OSError as error:
      failures[name] = str(error)
      continue
    files[name] = folder / f"{key}.npy"
    if not files[name].exists():
      todo[name] = path
  if todo:
    note(f"features: decoding and encoding {len(todo)} of {len(files)} videos")
  names = list(todo)
  # In turns: the pixels of all videos would not fit in memory.
  turn = max(batch * 16, 1)
  for start in range(0, len(names), turn):
    part = names[start : start + turn]
    frames, bad = video.load_many(
      [(name, todo[name]) for name in part],
      count=count,
      size=size,
      workers=workers,
      timeout_s=timeout_s,
    )
    failures |= {failure.id: failure.reason for failure in bad}
    _encode_all(frames, files, encode, batch)
    if len(names) > turn:
      note(f"features: {start + len(part)}/{len(names)} videos")
  files = {name: path for name, path in files.items() if name not in failures}
  return Store(files, failures, {})


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


def _encode_all(frames, files, encode: Encode, batch: int) -> None:
  """Writes the features of decoded videos, each file whole or not at all."""
  names = list(frames)
  for start in range(0, len(names), batch):
    part = names[start : start + batch]
    pixels = np.stack([frames[name] for name in part])
    fill = np.zeros((batch - len(part), *pixels.shape[1:]), pixels.dtype)
    made = encode(np.concatenate([pixels, fill]))[: len(part)]
    for name, feature in zip(part, made, strict=True):
      unfinished = files[name].with_suffix(f".{os.getpid()}.tmp")
      with open(unfinished, "wb") as stream:
        np.save(stream, feature.astype(np.float16))
      unfinished.replace(files[name])
