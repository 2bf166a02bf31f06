"""Collects the data of the report's sample viewer: sources with groups and clips.

A source contains the samples of one stage. A group contains the answers to one prompt
at one step. Each source has a maximum number of groups (see report/sources.py), and
MAX_PAGE_BYTES limits all groups and clips. The page shows the number of omitted groups.
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

# Size limit of groups and clips in bytes; with curves a page is below 20 MB.
MAX_PAGE_BYTES = 14_000_000
MAX_STRIP_FRAMES = 12  # Frames of a clip, side by side in one picture.
MAX_FRAME_HEIGHT, MAX_FRAME_WIDTH = 80, 144  # Pixels; the browser scales frames up.


def collect_viewer(root: Path, stages: Iterable[str]) -> JsonRow:
  """Returns the sources of a workdir, with the groups that fit.

  The rounds of a stage are steps of one source.
  """
  joined: dict[str, JsonRow] = {}
  for source in (source for name in stages for source in make_stage_source(root, name)):
    entry = joined.setdefault(source["name"], source | {"groups": [], "total": 0})
    entry["groups"] += [group | {"root": root} for group in source["groups"]]
    entry["total"] += source["total"]
  return fit_sources(list(joined.values()))


def fit_sources(sources: Sequence[JsonRow]) -> JsonRow:
  """Returns the sources with as many groups as MAX_PAGE_BYTES allows.

  The groups are selected in turn from each source.
  """
  clips: list[JsonRow] = []
  places: dict[tuple[Path, str], int] = {}  # Index of each video's clip.
  selected: dict[str, list[JsonRow]] = {source["name"]: [] for source in sources}
  size = 0
  for turn in itertools.zip_longest(*(source["groups"] for source in sources)):
    for source, group in zip(sources, turn, strict=True):
      if group is None or size > MAX_PAGE_BYTES:
        continue
      num_clips, video = len(clips), (group["root"], group["video"])
      if group["video"] and video not in places:
        places[video] = len(clips)
        clips.append(load_clip(*video))
      entry = {k: v for k, v in group.items() if k not in ("root", "video")}
      entry["clip"] = places.get(video)
      size += sum(len(htmlsafe_json_dumps(x)) for x in (entry, clips[num_clips:]))
      if size <= MAX_PAGE_BYTES:
        selected[source["name"]].append(entry)
  return {
    "clips": clips,
    "sources": [
      source
      | {
        "groups": sorted(selected[source["name"]], key=lambda group: group["step"]),
        "left_out": source["total"] - len(selected[source["name"]]),
      }
      for source in sources
    ],
  }


# Clips.


def load_clip(root: Path, video: str) -> JsonRow:
  """Returns the frames of a video of a workdir, or an error."""
  # Imported here, so that a report without videos needs no decoder.
  from vlmrlaif_jax.data.time_range import split_time_range
  from vlmrlaif_jax.data.video import (
    ByCount,
    Reading,
    VideoError,
    read_video_in_worker,
  )

  path = root / "world/videos" / video  # An absolute path stays as it is.
  if not Path(split_time_range(str(path)).path).exists():
    return {"error": f"no such file: {video}"}
  size = MAX_FRAME_WIDTH, MAX_FRAME_HEIGHT
  try:
    reading = Reading(ByCount(MAX_STRIP_FRAMES), within=size)
    return encode_strip(read_video_in_worker(path, reading).pixels)
  except VideoError as error:
    return {"error": str(error)}


def encode_strip(frames: UInt8[np.ndarray, "frames height width 3"]) -> JsonRow:
  """Returns the frames as one WebP picture in a data URI, with their size."""
  height, width = frames.shape[1:3]
  row = Image.fromarray(np.concatenate(frames, axis=1))
  data = io.BytesIO()
  row.save(data, "WEBP", quality=75)
  uri = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
  return {"uri": uri, "frames": len(frames), "width": width, "height": height}
