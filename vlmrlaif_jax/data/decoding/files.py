"""Files that may be read as frames of a video, and limits of their size."""

import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import UInt8

from vlmrlaif_jax.data.decoding.sampling import Selection, Timeline

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_FILE_GB = 32.0  # Size of a file, in GB.
MAX_PIXELS = 64_000_000  # Pixels of a frame; a frame of 8K video has 33 million.
MAX_SIDE = 65_535  # Pixels of a side, the largest in a JPEG.

Frame: TypeAlias = UInt8[np.ndarray, "height width 3"]
Choose: TypeAlias = Callable[[Timeline], Selection]  # Selects the frames to read.


class ReadFrame(NamedTuple):
  """A frame in the size that a reading gives it."""

  pixels: Frame
  size: tuple[int, int]  # Height and width before it was resized.


Each: TypeAlias = Callable[[Frame], ReadFrame]  # Applied to each frame that is read.
MakeEach: TypeAlias = Callable[[Selection], Each]


def check_regular_file(path: str | os.PathLike) -> None:
  """Raises an OSError unless a path leads to a regular file of at most MAX_FILE_GB.

  Devices and pipes may deliver bytes without end, or never one.
  """
  try:
    _check_status(os.stat(path))
  except FileNotFoundError:
    raise FileNotFoundError("there is no such file or folder") from None


def open_regular_file(path: str | os.PathLike) -> io.BufferedReader:
  """Opens a file to read; see check_regular_file.

  The open file is checked, so that it cannot be replaced in between. To open a pipe
  waits for a writer without O_NONBLOCK, which regular files ignore.
  """
  check_regular_file(path)
  file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
  try:
    _check_status(os.fstat(file.fileno()))
  except OSError:
    file.close()
    raise
  return file


def _check_status(status: os.stat_result) -> None:
  if not stat.S_ISREG(status.st_mode):
    raise OSError("it is not a regular file")
  if status.st_size > MAX_FILE_GB * 1e9:
    raise OSError(
      f"it has {status.st_size / 1e9:.1f} GB; at most {MAX_FILE_GB:g} GB are read. "
      "Split it"
    )


def check_size(width: int, height: int) -> None:
  """Raises a ValueError if a frame is too large to be read safely."""
  if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
    raise ValueError(
      f"a frame has {width} x {height} pixels; at most {MAX_PIXELS} pixels and "
      f"{MAX_SIDE} a side are read. Resize it."
    )


def list_images(folder: Path) -> list[Path]:
  """Returns the images of a folder, sorted by number: frame_9 before frame_10.

  Hidden files are omitted. macOS writes a `._1.jpg` next to `1.jpg` on other disks.

  Raises:
    FileNotFoundError: The folder contains no images.
  """
  images = [
    path
    for path in folder.iterdir()
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
  ]
  if not images:
    kinds = " ".join(IMAGE_SUFFIXES)
    raise FileNotFoundError(f"the folder contains no images ({kinds})")
  return sorted(images, key=_make_natural_key)


def _make_natural_key(path: Path) -> list[tuple[int, str]]:
  """Splits a name so that digits sort as numbers: "f10" -> [(-1, "f"), (10, "")]."""
  parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
  return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]
