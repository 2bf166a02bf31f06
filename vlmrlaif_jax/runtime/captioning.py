"""Captions the parts of videos, as the narrative that a judge reads.

VLM-RLAIF (2402.03746, 3.2): the video is cut into clips of at most 20 frames, each
is captioned, and the captions, joined, are the narrative.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.jsonl import append_jsonl, read_jsonl
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime.answering import Answerer, SamplingSettings
from vlmrlaif_jax.runtime.run import Run

Span = tuple[int, int]  # (start, stop): frames start..stop-1.


def split_into_clips(frames: int, clip_frames: int) -> list[Span]:
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


def caption_videos(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  path: pathlib.Path,
  *,
  which: str,
  batch: int,
) -> list[str]:
  """What a judge is told of each example's video; no clip is captioned twice.

  Args:
    variables: of run.policy, which captions.
    path: of the file that holds all captions ever made; the new ones are added.
    which: of the parts are told: a key of CONTEXTS.
    batch: clips at once.
  """
  model, config = run.config.model, run.config.label
  spans = CONTEXTS[which](split_into_clips(model.frames, model.clip_frames))
  if not spans:
    return [""] * len(examples)
  # What is sampled depends on what a video shows, and not on where it lies.
  names = [run.features.digest(example["video"]) for example in examples]
  videos = {n: e["video"] for n, e in zip(names, examples, strict=True)}
  sampling = SamplingSettings(
    config.caption_prompt_len, config.caption_max_new, batch, config.caption_temperature
  )
  captioner = Answerer(run, variables, sampling)
  rows = distributed.on_process_zero(lambda: read_jsonl(path) if path.exists() else [])
  known = {(r["video"], r["start"], r["stop"]): r["caption"] for r in rows}
  wanted = dict.fromkeys((name, *span) for name in names for span in spans)
  for length in sorted({stop - start for start, stop in spans}):
    new = [c for c in wanted if c[2] - c[1] == length and c not in known]
    queries = [
      JudgeQuery(
        f"caption:{a}:{name}", videos[name], run.prompts.caption, start=a, stop=b
      )
      for name, a, b in new
    ]
    made = dict(zip(new, captioner.ask_judge(queries), strict=True))
    if None in made.values():
      raise UserError(
        "the prompt for captions does not fit label.caption_prompt_len="
        f"{config.caption_prompt_len} with a clip of {length} frames: raise it, or "
        "lower model.clip_frames"
      )
    added = [
      {"video": name, "start": a, "stop": b, "caption": text}
      for (name, a, b), text in made.items()
    ]
    distributed.on_process_zero(functools.partial(append_jsonl, path, added))
    known |= made
  told = lambda name: (known[name, *span].strip() for span in spans)
  return [" ".join(filter(None, told(name))) for name in names]
