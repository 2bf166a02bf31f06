"""Checks of drawn figures."""

from PIL import Image

MOST_BYTES = 100_000


def check_figure(path):
  """Checks that a file is a PNG that is small, and not of one colour."""
  with Image.open(path) as image:
    assert image.format == "PNG"
    assert max(high - low for low, high in image.convert("RGB").getextrema()) > 100
  assert path.stat().st_size < MOST_BYTES
