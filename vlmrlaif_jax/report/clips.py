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
  """The frames of a video, or why there are none."""
  path = root / "world/videos" / video  # An absolute path stays as it is.
  if not path.exists():
    return {"error": f"no such file: {video}"}
  # Imported only where there is a video: a report of numbers needs no decoder.
  from vlmrlaif_jax.data.video import VideoError, decode

  try:
    frames = decode(path, FRAMES)
  except VideoError as error:
    return {"error": str(error)}
  return {"uri": uri(frames), "frames": len(frames)} | shape(frames)


def shape(frames: UInt8[np.ndarray, "frames height width 3"]) -> dict[str, int]:
  """Pixels of a frame as it is shown."""
  _, height, width, _ = frames.shape
  scale = min(HIGH / height, WIDE / width, 1.0)
  return {
    "width": max(round(width * scale), 1),
    "height": max(round(height * scale), 1),
  }


def uri(frames: UInt8[np.ndarray, "frames height width 3"]) -> str:
  """The frames beside each other, as the data URI of a WebP picture."""
  width, height = shape(frames).values()
  small = [
    np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames
  ]
  data = io.BytesIO()
  Image.fromarray(np.concatenate(small, axis=1)).save(data, "WEBP", quality=75)
  return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
