"""Images of any resolution: crops, and the features of crops without their padding.

An image is resized to one square, and to the rectangle of several squares in which it
keeps most pixels. LLaVA-NeXT (Liu et al. 2024) introduced these crops.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

# Images with more features than this ratio of those of `most` crops, on one axis, are
# resampled to those of `most` crops.
_MAX_RATIO = 1.1


class AnyResolution(NamedTuple):
  """Settings of crops, and the functions of an image of a height and a width."""

  image: int  # Side of a crop, in pixels.
  side: int  # Rows and columns of the features of a crop.
  pinpoints: tuple[tuple[int, int], ...]  # Heights and widths of rectangles in pixels.
  most: int  # Crops of which all features are used.
  width: int  # Width of merged features; see `resample_sources`.

  def choose_crops(self, height: int, width: int) -> tuple[int, int]:
    """Returns the rows and columns of crops.

    Those are best in which the image, resized without distortion, keeps most pixels;
    among these, those with the least padding.
    """

    def rate(sides: tuple[int, int]) -> tuple[int, int]:
      scale = min(sides[1] / width, sides[0] / height)
      pixels = min(int(width * scale) * int(height * scale), width * height)
      return pixels, -math.prod(sides)

    rows, columns = max(self.pinpoints, key=rate)
    return rows // self.image, columns // self.image

  def cut_crops(self, image: Image.Image) -> list[Image.Image]:
    """Returns the image in the size of a crop, and its crops, padded with black."""
    crops = self.choose_crops(image.height, image.width)
    height, width = (count * self.image for count in crops)
    scales = width / image.width, height / image.height
    if scales[0] < scales[1]:
      inner = min(math.ceil(image.height * scales[0]), height), width
    else:
      inner = height, min(math.ceil(image.width * scales[1]), width)
    whole = Image.new("RGB", (width, height))
    place = (width - inner[1]) // 2, (height - inner[0]) // 2
    whole.paste(resize(image, *inner), place)
    corners = [
      (left, top)
      for top in range(0, height, self.image)
      for left in range(0, width, self.image)
    ]
    parts = [whole.crop((x, y, x + self.image, y + self.image)) for x, y in corners]
    return [resize(image, self.image, self.image), *parts]

  def _find_features(self, height: int, width: int) -> tuple[slice, slice]:
    """Returns the rows and columns of the features of crops that are not padding."""
    rows, columns = (count * self.side for count in self.choose_crops(height, width))
    if width / height > columns / rows:
      padding = (rows - int(round(height * (columns / width), 7))) // 2
      return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)

  def fit_features(self, height: int, width: int) -> tuple[int, int]:
    """Returns the number of rows and columns of features of the crops of an image."""
    spans = self._find_features(height, width)
    rows, columns = (span.stop - span.start for span in spans)
    ratio = math.sqrt(rows * columns / (self.most * self.side**2))
    if ratio > _MAX_RATIO:
      return int(rows // ratio), int(columns // ratio)
    return rows, columns

  def arrange(
    self, features: Float[np.ndarray, "crops tokens channels"], height: int, width: int
  ) -> Float[np.ndarray, "placeholders channels"]:
    """Returns the features of the whole image, then rows of crops with newlines."""
    crops = self.choose_crops(height, width)
    channels = features.shape[-1]
    x = features[1:, :-1].reshape(*crops, self.side, self.side, channels)
    x = x.swapaxes(1, 2).reshape(*(count * self.side for count in crops), channels)
    x = x[self._find_features(height, width)]
    size = self.fit_features(height, width)
    if x.shape[:2] != size:
      x = resample(x, size) if channels == self.width else resample_sources(x, size)
    ends = np.broadcast_to(features[0, -1:], (size[0], 1, channels))
    rows = np.concatenate([x, ends], axis=1).reshape(-1, channels)
    return np.concatenate([features[0, :-1], rows])


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
  """Resizes with the bicubic filter."""
  return image.resize((width, height), Image.Resampling.BICUBIC)


def resample(
  x: Float[np.ndarray, "_rows _columns channels"], size: tuple[int, int]
) -> Float[np.ndarray, "rows columns channels"]:
  """Interpolates features bilinearly to a size, without aligned corners, in float32."""
  for axis, (first, last, weight) in enumerate(map(_locate, x.shape, size)):
    weight = weight.reshape((-1, 1, 1) if axis == 0 else (-1, 1))
    x = (1 - weight) * x.take(first, axis) + weight * x.take(last, axis)
  return x


def resample_sources(
  x: Float[np.ndarray, "_rows _columns channels"], size: tuple[int, int]
) -> Float[np.ndarray, "rows columns channels"]:
  """Returns the sources of `resample`, as models.llava_onevision joins them.

  Args:
    x: features before the merger, of which each has one source with the weight 1.
    size: rows and columns of the result.
  """
  each = (x.shape[-1] - 5) // 4
  (top, bottom, down), (left, right, across) = map(_locate, x.shape, size)
  corners = [x[np.ix_(i, j)][..., :each] for i in (top, bottom) for j in (left, right)]
  weights = [np.outer(a, b) for a in (1 - down, down) for b in (1 - across, across)]
  last = np.stack([*weights, np.zeros(size)], axis=-1)
  return np.concatenate([*corners, last.astype(x.dtype)], axis=-1)


def _locate(
  length: int, size: int
) -> tuple[
  Int[np.ndarray, " size"], Int[np.ndarray, " size"], Float[np.ndarray, " size"]
]:
  """Returns the two sources of each of `size` points, and the weight of the second."""
  at = np.maximum((np.arange(size) + 0.5) * length / size - 0.5, 0)
  first = np.floor(at).astype(int)
  return first, np.minimum(first + 1, length - 1), (at - first).astype(np.float32)
