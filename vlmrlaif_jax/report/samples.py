"""What the sample viewer of a report shows: sources, each with its groups.

A source is what one stage sampled, a group a prompt at a step, with its answers. All
of it is bounded: so many prompts of a source (report/sources.py), and LIMIT for all
of them and their clips; what was left out is counted.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps

from vlmrlaif_jax.report.clips import clip_of
from vlmrlaif_jax.report.files import Row
from vlmrlaif_jax.report.sources import of_stage

LIMIT = 14_000_000  # Bytes of groups and clips; with curves a page is below 20 MB.


def viewer(root: Path, stages: Iterable[str]) -> Row:
  """Returns the sources of a workdir with their groups, as far as they fit.

  Rounds are the steps of one source.
  """
  joined: dict[str, Row] = {}
  for source in (source for name in stages for source in of_stage(root, name)):
    known = joined.setdefault(source["name"], source | {"groups": [], "total": 0})
    known["groups"] += [group | {"root": root} for group in source["groups"]]
    known["total"] += source["total"]
  return fitted(list(joined.values()))


def fitted(sources: Sequence[Row]) -> Row:
  """Returns the sources with the groups that fit in LIMIT, taken from each in turn."""
  clips: list[Row] = []
  places: dict[tuple[Path, str], int] = {}  # A video that is shown often is read once.
  kept: dict[str, list[Row]] = {source["name"]: [] for source in sources}
  size = 0
  for turn in itertools.zip_longest(*(source["groups"] for source in sources)):
    for source, group in zip(sources, turn, strict=True):
      if group is None or size > LIMIT:
        continue
      known, video = len(clips), (group["root"], group["video"])
      if group["video"] and video not in places:
        places[video] = len(clips)
        clips.append(clip_of(*video))
      shown = {k: v for k, v in group.items() if k not in ("root", "video")}
      shown["clip"] = places.get(video)
      size += sum(len(htmlsafe_json_dumps(x)) for x in (shown, clips[known:]))
      if size <= LIMIT:
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
