"""Sizes to which the frames of Qwen2.5-VL and Qwen3-VL are resized."""

import functools
import math

FRAMES = 2  # Frames of a temporal patch.
MAX_RATIO = 200  # Greatest ratio of the sides of an image.
# Ratios of width and height of the sizes in a short list.
RATIOS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16, 21 / 9, 9 / 21)


def fit_size(
  height: int, width: int, frames: int, multiple: int, least: int, most: int
) -> tuple[int, int]:
  """Returns the height and width to which frames are resized.

  Args:
    height: height in pixels.
    width: width in pixels.
    frames: number of frames; 1 for an image.
    multiple: pixels that both results are multiples of.
    least: pixels of all frames at least.
    most: pixels of all frames at most.

  Raises:
    ValueError: A side is more than 200 times as long as the other.
  """
  if max(height, width) > MAX_RATIO * min(height, width):
    raise ValueError(
      f"frames of {height} x {width} pixels: a side may be at most {MAX_RATIO} times "
      "as long as the other. Crop them."
    )
  sides = [round(side / multiple) * multiple for side in (height, width)]
  # Frames fill temporal patches, but an image counts once.
  counted = 1 if frames == 1 else round(frames / FRAMES) * FRAMES
  pixels = counted * math.prod(sides)
  if pixels > most:
    scale = math.sqrt(frames * height * width / most)
    fit = lambda side: max(multiple, math.floor(side / scale / multiple) * multiple)
  elif pixels < least:
    scale = math.sqrt(least / (frames * height * width))
    fit = lambda side: math.ceil(side * scale / multiple) * multiple
  else:
    return sides[0], sides[1]
  return fit(height), fit(width)


@functools.cache
def list_sizes(
  least: int, most: int, patch: int, merge: int
) -> tuple[tuple[int, int], ...]:
  """Returns the rows and columns of patches of the grids that a run may have.

  The sizes have about the ratios RATIOS. The largest have at most `most` pixels, and
  the next at most a half of those before, down to `least`.

  >>> list_sizes(16384, 32768, 16, 2)[:4]
  ((10, 10), (8, 12), (12, 8), (8, 14))

  Args:
    least: pixels of a frame at least.
    most: pixels of a frame at most, unless one token has more.
    patch: side of a patch, in pixels.
    merge: side of the squares of patches that become one token.
  """
  token, sizes = (patch * merge) ** 2, []
  tokens = most / token
  for _ in range(1 + max(0, int(math.log2(most / max(least, token))))):
    sizes += [_fit_ratio(ratio, tokens) for ratio in RATIOS]
    tokens /= 2
  return tuple(
    (merge * rows, merge * columns) for rows, columns in dict.fromkeys(sizes)
  )


def _fit_ratio(ratio: float, tokens: float) -> tuple[int, int]:
  """Returns rows and columns of at most a number of tokens, and at least one each."""
  floor = lambda side: max(1, math.floor(side + 1e-9))  # Roots are not exact.
  short = floor(math.sqrt(tokens * min(ratio, 1 / ratio)))
  long = floor(min(math.sqrt(tokens * max(ratio, 1 / ratio)), tokens / short))
  return (short, long) if ratio > 1 else (long, short)
