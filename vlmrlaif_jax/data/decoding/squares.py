"""Padding of frames to squares, in memory proportional to their area."""

import math
from typing import NamedTuple

from PIL import Image

FILL = (122, 116, 104)  # Color of padding: int(255 * CLIP's mean), as in LLaVA.
BAND_PIXELS = 4_000_000  # Pixels that are padded and resized together.
EXACT_SIDE = 4096  # Pixels. Longer sides have their padding cut, see pad_and_resize.


class _Span(NamedTuple):
  """The pixels of one axis of the result that a frame influences, and their source."""

  first: int  # First pixel of the result.
  last: int  # Pixel after the last one.
  before: int  # Padding before the frame that these pixels depend on.
  size: int  # Size of the frame with its padding before and after.
  box: tuple[float, float]  # Place of the pixels in the padded frame.


def pad_and_resize(
  image: Image.Image, size: int, fill: tuple[int, ...] = FILL
) -> Image.Image:
  """Returns an RGB frame padded with a color to a square, and resized.

  Pillow resizes rows, then columns. So the rows are padded and resized in bands, and
  padding above and below is added to the resized rows. This equals padding to a square
  first, whose memory would grow with the square of the longer side. Of frames with a
  side above EXACT_SIDE, padding that influences no pixel of the frame is left out. As
  Pillow places it in float32, values may differ by 2 of 255.
  """
  side = max(image.size)
  across, down = (_find_span(length, side, size) for length in image.size)
  width = across.last - across.first
  narrow = Image.new("RGB", (width, down.size), fill)
  step = max(1, BAND_PIXELS // across.size)
  for top in range(0, image.height, step):
    height = min(step, image.height - top)
    band = Image.new("RGB", (across.size, height), fill)
    band.paste(image.crop((0, top, image.width, top + height)), (across.before, 0))
    left, right = across.box
    band = band.resize(
      (width, height), Image.Resampling.BICUBIC, (left, 0, right, height)
    )
    narrow.paste(band, (0, down.before + top))
  box = (0.0, down.box[0], float(width), down.box[1])
  shape = (width, down.last - down.first)
  square = Image.new("RGB", (size, size), fill)
  square.paste(
    narrow.resize(shape, Image.Resampling.BICUBIC, box), (across.first, down.first)
  )
  return square


def _find_span(length: int, side: int, size: int) -> _Span:
  """Returns the span of a frame of `length` pixels in the middle of `side` pixels."""
  offset = (side - length) // 2
  if side <= EXACT_SIDE:
    return _Span(0, size, offset, side, (0, side))
  scale = side / size
  reach = 2 * max(scale, 1.0)  # Half the width of the bicubic filter.
  first = max(0, math.floor((offset - reach) / scale) - 1)
  last = min(size, math.ceil((offset + length + reach) / scale) + 1)
  start = max(0, math.floor(first * scale - reach))
  stop = min(side, math.ceil(last * scale + reach))
  box = (first * scale - start, last * scale - start)
  return _Span(first, last, offset - start, stop - start, box)
