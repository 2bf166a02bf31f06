"""Reading of pictures and animations: JPEG, PNG, WebP, BMP, GIF."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlmrlaif_jax.data.decoding.files import (
  Choose,
  Each,
  Frame,
  MakeEach,
  ReadFrame,
  check_size,
  open_regular_file,
)
from vlmrlaif_jax.data.decoding.sampling import Selection, Timeline

# Pillow reads dozens of formats by content, among them PostScript, which it runs.
PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# The other pictures in a JPEG are no animation.
ANIMATIONS = (GifImageFile, PngImageFile, WebPImageFile)
MAGIC = (b"BM", b"GIF8", b"\xff\xd8\xff", b"\x89PNG")  # WebP is found by its RIFF type.
STREAM_SUFFIXES = (".mjpeg", ".mjpg")  # JPEG pictures one after another.
MIN_DURATION_MS = 11  # Browsers show frames with shorter durations for 100 ms.


def is_picture(path: str | os.PathLike) -> bool:
  """Returns whether a file is a picture or an animation, by its first bytes."""
  if Path(path).suffix.lower() in STREAM_SUFFIXES:
    return False
  with open_regular_file(path) as file:
    head = file.read(12)
  return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def read_images(
  paths: Sequence[str | os.PathLike], indices: Sequence[int], each: Each
) -> dict[int, ReadFrame]:
  """Reads the images of the given indices, and applies `each` to one at a time."""
  frames = {}
  for index in sorted(set(indices)):
    with open_image(paths[index]) as image:
      frames[index] = each(_convert(image))
  return frames


def read_animation(
  path: str | os.PathLike, choose: Choose, make_each: MakeEach
) -> tuple[list[ReadFrame], Selection]:
  """Reads the selected frames of an animation, or the one frame of a picture.

  Args:
    path: The file.
    choose: Selects the frames to read.
    make_each: Returns what is applied to one frame at a time, which bounds memory.

  Returns:
    The frames, and which they are.
  """
  with open_image(path) as image:
    timeline, first = measure_animation(image)
  chosen = choose(timeline)
  each, frames = make_each(chosen), {}
  with open_image(path) as image:
    for index in range(max(chosen.numbers) + 1):
      if first + index:
        image.seek(first + index)
      if index in chosen.numbers:
        frames[index] = each(_convert(image))
      else:
        image.load()
  return [frames[i] for i in chosen.numbers], chosen


def measure_animation(image: Image.Image) -> tuple[Timeline, int]:
  """Returns the times of an animation's frames, and its first frame's index.

  A PNG may contain a picture for programs that show no animations, before the frames.
  """
  first = int(bool(image.info.get("default_image", False)))
  total = image.n_frames if isinstance(image, ANIMATIONS) else 1
  if total <= 1:
    return Timeline(np.zeros(1), 0.0), 0
  durations = []
  for index in range(first, total):
    image.seek(index)
    image.load()  # Pillow knows the duration of a WebP's frame afterwards.
    duration = float(image.info.get("duration", 0))
    durations.append(duration if duration >= MIN_DURATION_MS else 100.0)
  ends = np.cumsum(durations) / 1000
  return Timeline(np.concatenate([[0.0], ends[:-1]]), float(ends[-1])), first


@contextlib.contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
  """Opens a picture of one of PICTURE_FORMATS, of a size that is safe to decode."""
  with (
    open_regular_file(path) as file,
    Image.open(file, formats=PICTURE_FORMATS) as image,
  ):
    check_size(*image.size)
    yield image


def _convert(image: Image.Image) -> Frame:
  """Returns a picture upright, in RGB with 8 bits, over white where transparent."""
  try:
    upright = ImageOps.exif_transpose(image)
  except SyntaxError:  # Pillow's error for damaged EXIF data, which viewers ignore.
    upright = image
  if upright.mode == "I" or upright.mode.startswith("I;16"):
    gray = np.clip(np.asarray(upright).astype(np.int64), 0, 65535)
    gray = ((gray + 128) // 257).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)
  return np.asarray(flatten(upright))


def flatten(image: Image.Image) -> Image.Image:
  """Returns a picture in RGB, over white where it is transparent."""
  if not image.has_transparency_data:
    return image.convert("RGB")
  image = image.convert("RGBA")
  white = Image.new("RGBA", image.size, "white")
  return Image.alpha_composite(white, image).convert("RGB")
