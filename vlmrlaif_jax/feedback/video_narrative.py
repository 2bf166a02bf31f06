"""What a judge is told of a video beside seeing it: captions of its parts.

VLM-RLAIF (2402.03746, 3.2): the video is cut into clips of at most 20 frames, each
is captioned, and the captions, joined, are the narrative.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.jsonl import append_jsonl, read_jsonl

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
  starts = range(0, frames, clip_frames)
  return [(start, min(start + clip_frames, frames)) for start in starts]


# The clips whose captions a judge reads: none, the one in the middle, or all.
CONTEXTS: dict[str, Callable[[list[Span]], list[Span]]] = {
  "none": lambda clips: [],
  "one": lambda clips: clips[len(clips) // 2 :][:1],
  "all": lambda clips: clips,
}


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
  told = lambda video: (known[Clip(video, *span)].strip() for span in spans)
  return [" ".join(filter(None, told(video))) for video in videos]
