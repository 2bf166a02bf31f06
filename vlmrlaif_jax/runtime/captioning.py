"""Captions clips of videos, as the narratives that a judge reads.

VLM-RLAIF (2402.03746, section 3.2) cuts a video into clips of at most 20 frames and
captions each clip. The joined captions are the narrative. A clip is a range of temporal
patches, which are single frames in LLaVA and two frames in Qwen3-VL.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.jsonl import (
  JsonRow,
  append_jsonl,
  format_damage,
  read_intact_rows,
  seal_row,
  write_records,
)
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data.processors.interface import Visual
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.video import Media, VideoPath, list_media
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime.answering import Answerer, SamplingSettings, encode_prompt
from vlmrlaif_jax.runtime.run import Run

Span = tuple[int, int]  # (start, stop): the temporal patches start..stop-1.


class Clip(NamedTuple):
  """A range of temporal patches of a video."""

  video: str  # Digest of the features, so that a caption does not depend on a path.
  start: int
  stop: int


def split_into_clips(patches: int, size: int) -> list[Span]:
  """Returns consecutive spans of `size` temporal patches; the last may be shorter.

  >>> split_into_clips(50, 20)
  [(0, 20), (20, 40), (40, 50)]
  """
  return [(at, min(at + size, patches)) for at in range(0, patches, size)]


# Selects the clips whose captions a judge reads: none, the middle one, or all.
CONTEXTS: dict[str, Callable[[list[Span]], list[Span]]] = {
  "none": lambda clips: [],
  "one": lambda clips: clips[len(clips) // 2 :][:1],
  "all": lambda clips: clips,
}


def split_layout(run: Run, layout: Visual) -> list[Span]:
  """Returns the clips of a video with a layout, each of at most model.clip_frames.

  An image is one clip.
  """
  if layout.size:
    return [(0, layout.grid.time)]
  size = max(run.config.model.clip_frames // layout.patch_frames, 1)
  return split_into_clips(layout.grid.time, size)


def select_clips(run: Run, media: Media, which: str) -> dict[Clip, VideoPath]:
  """Returns the clips of a conversation's videos that are captioned, in order.

  A clip has at most model.clip_frames frames, or one temporal patch if that has more.

  Args:
    run: the run, with the features of the videos.
    media: one video, or several videos and images.
    which: a key of CONTEXTS, for each video.
  """
  return {
    Clip(run.features.digest(path), *span): path
    for path in list_media(media)
    for span in CONTEXTS[which](split_layout(run, run.features.get_layout(path)))
  }


def check_clips(
  run: Run, examples: Sequence[Example], which: str, known: Container[Clip] = ()
) -> dict[Clip, VideoPath]:
  """Checks that the prompts for captions of clips fit, and returns the clips.

  Args:
    run: the run, with the features of the videos.
    examples: examples with a video.
    which: clips that are captioned, a key of CONTEXTS.
    known: clips that have a caption, which are left out.

  Raises:
    UserError: a prompt is longer than label.caption_prompt_len.
  """
  limit, new = run.config.label.caption_prompt_len, {}
  for example in examples:
    for clip, path in select_clips(run, example["video"], which).items():
      if clip in known or clip in new:
        continue
      new[clip] = path
      tokens = run.lay_out_video(path, clip.start, clip.stop)
      count = len(encode_prompt(run, [(run.prompts.caption, None)], tokens).ids)
      if count > limit:
        raise UserError(
          f"the prompt for captions does not fit label.caption_prompt_len={limit}: it "
          f"has {count} tokens for the clip {clip.start}-{clip.stop} of the video of "
          f"{example['id']}. Raise --config.label.caption_prompt_len or lower "
          "--config.model.clip_frames"
        )
  return new


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
    UserError: the prompt of a new caption is longer than label.caption_prompt_len.
  """
  rows = distributed.on_process_zero(lambda: _read_captions(path))
  known = {Clip(r["video"], r["start"], r["stop"]): r["caption"] for r in rows}
  new = check_clips(run, examples, which, known)
  # Without a layout of all videos, features are padded, so all clips have one shape.
  length = lambda clip: clip.stop - clip.start if run.processor.layout else 0
  for _, part in itertools.groupby(sorted(new, key=length), key=length):
    captions = _caption_clips(run, variables, {c: new[c] for c in part}, batch)
    lines = [
      seal_row({**clip._asdict(), "caption": text}) for clip, text in captions.items()
    ]
    distributed.on_process_zero(functools.partial(append_jsonl, path, lines))
    known |= captions
  join = lambda own: " ".join(filter(None, (known[clip].strip() for clip in own)))
  return [join(select_clips(run, each["video"], which)) for each in examples]


def _read_captions(path: pathlib.Path) -> list[JsonRow]:
  """Returns the intact rows of a file of captions, and removes the damaged ones."""
  if not path.exists():
    return []
  rows, damaged = read_intact_rows(path)
  complete = [row for row in rows if {*Clip._fields, "caption"} <= row.keys()]
  if damaged or len(complete) < len(rows):
    why = format_damage(path, damaged or {1: "a key is missing"})
    distributed.print_once(f"{why}: captioning its clip again")
    write_records(path, map(seal_row, complete))
  return complete


def _caption_clips(
  run: Run, variables: Params, videos: Mapping[Clip, VideoPath], batch: int
) -> dict[Clip, str]:
  """Returns the captions of clips whose features have one shape.

  Args:
    run: the run whose policy writes the captions.
    variables: variables of run.policy.
    videos: the video of each clip. The prompts fit; see check_clips.
    batch: clips that are captioned concurrently.
  """
  config = run.config.label
  sampling = SamplingSettings(
    config.caption_prompt_len, config.caption_max_new, batch, config.caption_temperature
  )
  queries = [
    JudgeQuery(
      f"caption:{clip.start}:{clip.video}",
      video,
      run.prompts.caption,
      start=clip.start,
      stop=clip.stop,
    )
    for clip, video in videos.items()
  ]
  replies = Answerer(run, variables, sampling).generate_replies(queries)
  return {clip: first.text for clip, (first, *_) in zip(videos, replies, strict=True)}
