"""What the sample viewer of a report shows: sources, each with its groups.

A source is what one stage sampled, a group a prompt at a step, with its answers. All
of it is bounded: so many prompts of a source (report/sources.py), and LIMIT for all
of them and their clips; what was left out is counted.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps

from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.report.clips import Clips
from vlmrlaif_jax.report.files import Row
from vlmrlaif_jax.report.sources import of_stage

LIMIT = 14_000_000  # Bytes of groups and clips; with curves a page is below 20 MB.


def viewer(root: Path, stages: Iterable[str]) -> Row:
  """Returns the sources of a workdir with their groups, as far as they fit."""
  made = join_rounds(source for name in stages for source in of_stage(root, name))
  for source in made:
    for group in source["groups"]:
      group["root"] = root
  return fitted(made)


def join_rounds(sources: Iterable[Row]) -> list[Row]:
  """Returns the sources, with those by round joined: their steps are the rounds."""
  joined: dict[str, Row] = {}
  for source in sources:
    kind = split_round(source["name"])[0]
    name = kind if source["by_round"] else source["name"]
    if name in joined:
      joined[name]["groups"] += source["groups"]
      joined[name]["total"] += source["total"]
    elif source["by_round"]:
      title, file = f"{kind.capitalize()}, by round", f"{kind}_N/answers.jsonl"
      joined[name] = source | {"name": kind, "title": title, "file": file}
    else:
      joined[name] = source
  return list(joined.values())


def fitted(sources: Sequence[Row]) -> Row:
  """Returns the sources with the groups that fit in LIMIT, taken from each in turn."""
  clips = Clips()
  turns = itertools.zip_longest(*(source["groups"] for source in sources))
  kept: dict[str, list[Row]] = {source["name"]: [] for source in sources}
  size = 0
  for turn in turns:
    for source, group in zip(sources, turn, strict=True):
      if group is None or size > LIMIT:
        continue
      known = len(clips.made)
      place = clips(group["root"], group["video"])
      shown = {k: v for k, v in group.items() if k not in ("root", "video")}
      shown["clip"] = place
      size += sum(len(htmlsafe_json_dumps(x)) for x in (shown, clips.made[known:]))
      if size <= LIMIT:
        kept[source["name"]].append(shown)
  return {
    "clips": clips.made,
    "sources": [
      source
      | {
        "groups": sorted(kept[source["name"]], key=lambda group: group["step"]),
        "left_out": source["total"] - len(kept[source["name"]]),
      }
      for source in sources
    ],
  }
