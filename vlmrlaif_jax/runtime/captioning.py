"""Captions the parts of videos, as the narrative that a judge reads."""

import pathlib
from collections.abc import Sequence

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback import video_narrative
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.runtime.answering import Answerer
from vlmrlaif_jax.runtime.run import Run


def narratives(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  path: pathlib.Path,
  *,
  which: str,
  batch: int,
) -> list[str]:
  """What a judge is told of each example's video: captions of its parts.

  Args:
    variables: of run.policy, which captions.
    path: of the file that keeps the captions.
    which: of the parts are told: "none", "one", "all".
    batch: clips at once.
  """
  model, config = run.config.model, run.config.label
  spans = video_narrative.clip_spans(model.frames, model.clip_frames)
  spans = video_narrative.CONTEXTS[which](spans)
  if not spans:
    return [""] * len(examples)
  # What is sampled depends on what a video shows, and not on where it lies.
  name = lambda example: run.features.digest(example["video"])
  videos = {name(e): e["video"] for e in examples}
  sampling = answering.Sampling(
    config.caption_prompt_len, config.caption_max_new, batch, config.caption_temperature
  )
  captioner = Answerer(run, variables, sampling)

  def ask(clips: Sequence[video_narrative.Clip]) -> list[str]:
    ids = [f"caption:{c.start}:{c.video}" for c in clips]
    requests = [
      answering.Request(id, videos[c.video], run.prompts.caption, c.start, c.stop)
      for id, c in zip(ids, clips, strict=True)
    ]
    texts = captioner.texts(requests)
    captions = [text for text in texts if text is not None]
    if len(captions) < len(texts):
      raise UserError(
        "the prompt for captions does not fit label.caption_prompt_len="
        f"{config.caption_prompt_len} with a clip of {clips[0].stop - clips[0].start} "
        "frames: raise it, or lower model.clip_frames"
      )
    return captions

  return video_narrative.describe([name(e) for e in examples], spans, ask, path)
