"""Generated parts of the documentation: text between markers, and figures."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
  from matplotlib.figure import Figure

DPI = 120


def replace_block(text: str, name: str, block: str) -> str:
  """Returns the text with a block in place of what is between its markers.

  Raises:
    ValueError: The text does not have each marker once.
  """
  begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
  if text.count(begin) != 1 or text.count(end) != 1:
    raise ValueError(f"the document must hold {begin!r} and {end!r} once each")
  pattern = re.escape(begin) + ".*?" + re.escape(end)
  return re.sub(pattern, lambda _: f"{begin}\n{block}\n{end}", text, flags=re.S)


def new_figure(width: float, height: float, layout: str = "tight") -> "Figure":
  """Returns an empty figure; sizes are in inches."""
  from matplotlib.figure import Figure  # Of the extra "bench".

  return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: "Figure", path: Path) -> None:
  """Writes a figure as a PNG with a palette; equal figures give equal files."""
  path.parent.mkdir(parents=True, exist_ok=True)
  drawn = io.BytesIO()
  figure.savefig(drawn, dpi=DPI, facecolor="white")
  # The file is three times smaller, and no colour is off by more than some 6 of 255.
  image = Image.open(drawn).convert("RGB")
  image.quantize(method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
