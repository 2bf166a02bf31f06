"""Captions clips of videos, as the narratives that a judge reads.

VLM-RLAIF (2402.03746, section 3.2) cuts a video into clips of at most 20 frames and
captions each clip. The joined captions are the narrative.
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

Span = tuple[int, int]  # (start, stop): the frames start..stop-1.


def split_into_clips(frames: int, clip_frames: int) -> list[Span]:
  """Returns consecutive spans of `clip_frames` frames; the last may be shorter.

  >>> split_into_clips(50, 20)
  [(0, 20), (20, 40), (40, 50)]
  """
  starts = range(0, frames, clip_frames)
  return [(start, min(start + clip_frames, frames)) for start in starts]


# Selects the clips whose captions a judge reads: none, the middle one, or all.
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
  """Returns the narrative of each example's video, "" where no clip is selected.

  Args:
    run: the run whose policy writes the captions.
    variables: variables of run.policy.
    examples: examples with a video.
    path: JSONL file of captions. Clips in it are not captioned again; new captions are
      appended.
    which: clips that are captioned, a key of CONTEXTS.
    batch: clips that are captioned concurrently.

  Raises:
    UserError: the caption prompt is longer than label.caption_prompt_len.
  """
  model, config = run.config.model, run.config.label
  spans = CONTEXTS[which](split_into_clips(model.frames, model.clip_frames))
  if not spans:
    return [""] * len(examples)
  if run.processor.layout is None:
    raise UserError(
      "clips of a video are captioned only with a fixed number of frames per video, "
      f"which {run.config.model.path} does not have. Set --config.label.context=none"
    )
  # Ids are digests of features, so that a caption does not depend on a video's path.
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
    captions = dict(zip(new, captioner.ask_judge(queries), strict=True))
    if None in captions.values():
      raise UserError(
        "the prompt for captions does not fit label.caption_prompt_len="
        f"{config.caption_prompt_len} with a clip of {length} frames. Raise "
        "--config.label.caption_prompt_len or lower --config.model.clip_frames"
      )
    added = [
      {"video": name, "start": a, "stop": b, "caption": text}
      for (name, a, b), text in captions.items()
    ]
    distributed.on_process_zero(functools.partial(append_jsonl, path, added))
    known |= captions
  clip_captions = lambda name: (known[name, *span].strip() for span in spans)
  return [" ".join(filter(None, clip_captions(name))) for name in names]
