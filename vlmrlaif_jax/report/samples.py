"""What the sample viewer of a report shows: sources, each with its groups.

A source is what one stage sampled, a group a prompt at a step, with its answers. All
of it is bounded: so many prompts of a source (report/sources.py), and LIMIT for all
of them and their clips; what was left out is counted.
"""

import base64
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from jinja2.utils import htmlsafe_json_dumps
from PIL import Image

from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.report.sources import make_stage_source

MAX_PAGE_BYTES = (
  14_000_000  # Bytes of groups and clips; with curves a page is below 20 MB.
)
MAX_STRIP_FRAMES = 12  # Of a clip, beside each other in one small picture.
HIGH, WIDE = 80, 144  # Pixels of a frame, at most; the browser enlarges small ones.


def collect_viewer(root: Path, stages: Iterable[str]) -> JsonRow:
  """Returns the sources of a workdir with their groups, as far as they fit.

  Rounds are the steps of one source.
  """
  joined: dict[str, JsonRow] = {}
  for source in (source for name in stages for source in make_stage_source(root, name)):
    known = joined.setdefault(source["name"], source | {"groups": [], "total": 0})
    known["groups"] += [group | {"root": root} for group in source["groups"]]
    known["total"] += source["total"]
  return fit_sources(list(joined.values()))


def fit_sources(sources: Sequence[JsonRow]) -> JsonRow:
  """Returns the sources with the groups that fit in LIMIT, taken from each in turn."""
  clips: list[JsonRow] = []
  places: dict[tuple[Path, str], int] = {}  # A video that is shown often is read once.
  kept: dict[str, list[JsonRow]] = {source["name"]: [] for source in sources}
  size = 0
  for turn in itertools.zip_longest(*(source["groups"] for source in sources)):
    for source, group in zip(sources, turn, strict=True):
      if group is None or size > MAX_PAGE_BYTES:
        continue
      known, video = len(clips), (group["root"], group["video"])
      if group["video"] and video not in places:
        places[video] = len(clips)
        clips.append(load_clip(*video))
      shown = {k: v for k, v in group.items() if k not in ("root", "video")}
      shown["clip"] = places.get(video)
      size += sum(len(htmlsafe_json_dumps(x)) for x in (shown, clips[known:]))
      if size <= MAX_PAGE_BYTES:
        kept[source["name"]].append(shown)
  return {
    "clips": clips,
    "sources": [
      source
      | {
        "groups": sorted(kept[source["name"]], key=lambda group: group["step"]),
        "left_out": source["total"] - len(kept[source["name"]]),
      }
      for source in sources
    ],
  }


# Clips.


def load_clip(root: Path, video: str) -> JsonRow:
  """Returns the frames of a video of a workdir, or why there are none."""
  path = root / "world/videos" / video  # An absolute path stays as it is.
  if not path.exists():
    return {"error": f"no such file: {video}"}
  # Imported only where there is a video: a report of numbers needs no decoder.
  from vlmrlaif_jax.data.video import VideoError, decode_video

  try:
    return encode_strip(decode_video(path, MAX_STRIP_FRAMES))
  except VideoError as error:
    return {"error": str(error)}


def encode_strip(frames: UInt8[np.ndarray, "frames height width 3"]) -> JsonRow:
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
