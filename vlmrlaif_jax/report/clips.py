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


def clip_of(root: Path, video: str) -> dict[str, Any]:
  """Returns the frames of a video of a workdir, or why there are none."""
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
