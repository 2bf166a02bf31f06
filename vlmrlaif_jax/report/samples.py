"""What the sample viewer of a report shows: sources, each with its groups.

A source is what one stage sampled, a group a prompt at a step, with its answers. All
of it is bounded: so many prompts of a source (report/sources.py), and LIMIT for all
of them and their clips; what was left out is counted.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from jinja2.utils import htmlsafe_json_dumps

from vlmrlaif_jax.core.stage_names import split_round
from vlmrlaif_jax.report.clips import Clips
from vlmrlaif_jax.report.sources import of_stage

Row: TypeAlias = dict[str, Any]

LIMIT = 14_000_000  # Bytes of groups and clips; with curves a page is below 20 MB.


def viewer(root: Path, stages: Iterable[str], clips: Clips) -> Row:
  """The sources of a workdir with their groups, as far as they fit."""
  made = [source for name in stages for source in of_stage(root, name)]
  joined = join_rounds(made)
  for source in joined:
    for group in source["groups"]:
      group["root"] = root
  return fitted(joined, clips)


def join_rounds(sources: Sequence[Row]) -> list[Row]:
  """The rounds of claims as one source, whose steps they are."""
  rounds = [s for s in sources if split_round(s["name"])[0] == "claims"]
  if not rounds:
    return list(sources)
  joined = {
    "name": "claims",
    "title": "Claims, by round",
    "file": "claims_N/answers.jsonl",
    "groups": [group for source in rounds for group in source["groups"]],
    "total": sum(source["total"] for source in rounds),
    "means": {},
  }
  place = sources.index(rounds[0])
  rest = [source for source in sources if source not in rounds]
  return [*rest[:place], joined, *rest[place:]]


def fitted(sources: Sequence[Row], clips: Clips) -> Row:
  """The sources with the groups that fit in LIMIT, taken from each in turn."""
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
