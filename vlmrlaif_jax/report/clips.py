"""Videos of the report: frames beside each other in one small picture each."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

FRAMES = 12
HIGH, WIDE = 80, 144  # Pixels of a frame, at most; the browser enlarges small ones.


class Clips:
  """Clips by their place in the page; a video that is shown often is decoded once."""

  def __init__(self):
    self.made: list[dict[str, Any]] = []
    self._places: dict[tuple[Path, str], int] = {}

  def __call__(self, root: Path, video: str | None) -> int | None:
    """Where a video stands in `made`; None for a row that names none.

    Args:
      root: the workdir that the row is of.
    """
    if not video:
      return None
    if (root, video) not in self._places:
      self._places[root, video] = len(self.made)
      self.made.append(_made(root, video))
    return self._places[root, video]


def _made(root: Path, video: str) -> dict[str, Any]:
  """Returns the frames of a video, or why there are none."""
  path = root / "world/videos" / video  # An absolute path stays as it is.
  if not path.exists():
    return {"error": f"no such file: {video}"}
  # Imported only where there is a video: a report of numbers needs no decoder.
  from vlmrlaif_jax.data.video import VideoError, decode

  try:
    return strip(decode(path, FRAMES))
  except VideoError as error:
    return {"error": str(error)}


def strip(frames: UInt8[np.ndarray, "frames height width 3"]) -> dict[str, Any]:
  """Returns the frames in one picture, as the data URI of a WebP, and their size."""
  small = [Image.fromarray(frame) for frame in frames]
  for frame in small:
    frame.thumbnail((WIDE, HIGH))
  width, height = small[0].size
  row = Image.fromarray(np.concatenate([np.asarray(frame) for frame in small], axis=1))
  data = io.BytesIO()
  row.save(data, "WEBP", quality=75)
  uri = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
  return {"uri": uri, "frames": len(small), "width": width, "height": height}
