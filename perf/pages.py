"""Updates generated parts of the documentation: text between markers, and figures."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
  from matplotlib.figure import Figure

DPI = 120


def replace_block(text: str, name: str, block: str) -> str:
  """Replaces the text between two markers.

  Args:
    text: The page.
    name: Name of the markers, <!-- name --> and <!-- end of name -->.
    block: The new text.

  Raises:
    ValueError: The text does not contain each marker once.
  """
  begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
  if text.count(begin) != 1 or text.count(end) != 1:
    raise ValueError(f"the document must contain {begin!r} and {end!r} once each")
  pattern = re.escape(begin) + ".*?" + re.escape(end)
  return re.sub(pattern, lambda _: f"{begin}\n{block}\n{end}", text, flags=re.S)


def create_figure(width: float, height: float, layout: str = "tight") -> "Figure":
  """Returns an empty figure; width and height are in inches."""
  from matplotlib.figure import Figure  # Installed by the extra "bench".

  return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: "Figure", path: Path) -> None:
  """Writes a figure as a PNG with a palette; equal figures give equal files."""
  path.parent.mkdir(parents=True, exist_ok=True)
  drawn = io.BytesIO()
  figure.savefig(drawn, dpi=DPI, facecolor="white")
  # The palette makes the file three times smaller; colors change by at most 6 of 255.
  image = Image.open(drawn).convert("RGB")
  image.quantize(method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
