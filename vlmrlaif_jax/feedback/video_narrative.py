"""What a judge is told of a video beside seeing it: captions of its parts.

VLM-RLAIF (2402.03746, 3.2): the video is cut into clips of at most 20 frames, each
is captioned, and the captions, joined, are the narrative.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.jsonl import append_jsonl, read_jsonl

Item = TypeVar("Item")
Span = tuple[int, int]  # (start, stop): frames start..stop-1.


class Clip(NamedTuple):
  """Part of a video."""

  video: str  # Its name.
  start: int
  stop: int


def clip_spans(frames: int, clip_frames: int) -> list[Span]:
  """Consecutive spans of clip_frames; the last one has what is left.

  50 frames in clips of 20: (0, 20), (20, 40), (40, 50).
  """
  if frames < 1 or clip_frames < 1:
    raise ValueError(
      f"frames and clip_frames must be 1 or more, not {frames} and {clip_frames}"
    )
  starts = range(0, frames, clip_frames)
  return [(start, min(start + clip_frames, frames)) for start in starts]


CONTEXTS = ("none", "one", "all")


def choose(context: str, clips: Sequence[Item]) -> list[Item]:
  """Returns the clips whose captions a judge reads.

  Args:
    context: one of CONTEXTS; "one" is the clip in the middle.

  Raises:
    ValueError: the context is none of them.
  """
  if context not in CONTEXTS:
    raise ValueError(f"context must be one of {CONTEXTS}, not {context!r}")
  middle = len(clips) // 2
  kept = {"none": [], "one": clips[middle : middle + 1], "all": clips}
  return list(kept[context])


def narrative(captions: Sequence[str]) -> str:
  """Captions in order of time, as one text."""
  return " ".join(filter(None, (caption.strip() for caption in captions)))


def describe(
  videos: Sequence[str],
  spans: Sequence[Span],
  ask: Callable[[Sequence[Clip]], Sequence[str]],
  path: Path,
) -> list[str]:
  """The narrative of each video; no clip is captioned twice.

  Args:
    videos: names; one may stand there more than once.
    ask: captions clips, which all have the same number of frames.
    path: of the file that holds all captions ever made; the new ones are added.
  """
  rows = distributed.once(lambda: read_jsonl(path) if path.exists() else [])
  known = {Clip(r["video"], r["start"], r["stop"]): r["caption"] for r in rows}
  wanted = dict.fromkeys(Clip(video, *span) for video in videos for span in spans)
  for length in sorted({stop - start for start, stop in spans}):
    new = [c for c in wanted if c.stop - c.start == length and c not in known]
    made = dict(zip(new, ask(new) if new else [], strict=True))
    added = [{**c._asdict(), "caption": text} for c, text in made.items()]
    distributed.once(functools.partial(append_jsonl, path, added))
    known |= made
  told = lambda video: [known[Clip(video, *span)] for span in spans]
  return [narrative(told(video)) for video in videos]
