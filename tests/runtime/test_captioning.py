"""Clips, captions and narratives: each frame in one clip, each clip captioned once."""

import types

import pytest
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.jsonl import append_jsonl, read_jsonl
from vlmrlaif_jax.data.processors.llava import LlavaProcessor
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.runtime import answering, captioning
from vlmrlaif_jax.runtime.answering import VideoReply
from vlmrlaif_jax.runtime.run import Run


@pytest.mark.parametrize(
  ("frames", "clip_frames", "spans"),
  [
    (50, 20, [(0, 20), (20, 40), (40, 50)]),
    (12, 4, [(0, 4), (4, 8), (8, 12)]),
    (5, 20, [(0, 5)]),
    (3, 1, [(0, 1), (1, 2), (2, 3)]),
  ],
)
def test_clips_follow_each_other_and_the_last_is_the_rest(frames, clip_frames, spans):
  assert captioning.split_into_clips(frames, clip_frames) == spans


@pytest.mark.parametrize(
  ("mode", "count", "chosen"),
  [
    ("none", 3, []),
    ("one", 3, [1]),
    ("one", 1, [0]),
    ("one", 4, [2]),
    ("all", 3, [0, 1, 2]),
  ],
)
def test_clips_are_chosen_by_the_context(mode, count, chosen):
  found = captioning.CONTEXTS[mode]([(i, i + 1) for i in range(count)])
  assert [start for start, _ in found] == chosen


# Captions. The captioner names the frames it was shown.


@pytest.fixture
def narratives(tmp_path, monkeypatch):
  """A function of videos to their narratives; `calls` has the clips of each call."""

  def answer(run, variables, queries, sampling, *, seed):
    if queries:
      told.calls.append([(q.video, q.start, q.stop) for q in queries])
    return [[VideoReply(told.say(q), True)] for q in queries]

  def told(videos, frames=5):
    config = dict(
      seed=0,
      model=dict(frames=frames, clip_frames=2, prompts="brief"),
      label=dict(caption_prompt_len=8, caption_max_new=8, caption_temperature=0.0),
    )
    run = Run(**dict.fromkeys(Run._fields))._replace(
      processor=LlavaProcessor(frames, image=16, patch=4),
      config=ConfigDict(config),
      features=types.SimpleNamespace(digest=lambda video: video),
    )
    examples = [{"video": video} for video in videos]
    return captioning.caption_videos(run, {}, examples, told.path, which="all", batch=4)

  told.path, told.calls = tmp_path / "captions.jsonl", []
  told.say = lambda query: f"{query.video}{query.start}-{query.stop}."
  monkeypatch.setattr(answering, "answer_requests", answer)
  return told


def test_narrative_is_in_order_of_time(narratives):
  assert narratives(["b", "a"]) == ["b0-2. b2-4. b4-5.", "a0-2. a2-4. a4-5."]


def test_narrative_joins_captions_and_skips_empty_ones(narratives):
  captions = {0: "A ball rolls. ", 2: "", 4: " It stops."}
  narratives.say = lambda query: captions[query.start]
  assert narratives(["a"], frames=6) == ["A ball rolls. It stops."]


def test_clips_of_one_length_are_asked_for_together(narratives):
  narratives(["a", "b"])
  assert narratives.calls == [
    [("a", 4, 5), ("b", 4, 5)],
    [("a", 0, 2), ("a", 2, 4), ("b", 0, 2), ("b", 2, 4)],
  ]


def test_clip_is_captioned_once(narratives):
  first, again = narratives(["a", "a"], frames=2), narratives(["a"], frames=2)
  assert (first, again) == (["a0-2."] * 2, ["a0-2."])
  assert narratives.calls == [[("a", 0, 2)]]
  caption = {"video": "a", "start": 0, "stop": 2, "caption": "a0-2."}
  assert read_jsonl(narratives.path) == [caption]


def test_caption_that_was_cut_short_is_made_again(narratives):
  caption = {"video": "a", "start": 0, "stop": 2, "caption": "whole"}
  append_jsonl(narratives.path, [caption])
  with narratives.path.open("a") as file:
    file.write('{"video": "a", "start": 2, "st')
  assert narratives(["a"], frames=4) == ["whole a2-4."]
  assert narratives.calls == [[("a", 2, 4)]]


def test_no_videos_tell_nothing(narratives):
  assert (narratives([]), narratives.calls) == ([], [])


def test_clips_of_videos_with_layouts_of_their_own_are_refused(tmp_path):
  config = ConfigDict(
    dict(model=dict(frames=5, clip_frames=2, path="qwen"), label=dict())
  )
  run = Run(**dict.fromkeys(Run._fields))._replace(
    config=config, processor=Qwen3VLProcessor()
  )
  with pytest.raises(UserError, match="label.context=none"):
    captioning.caption_videos(run, {}, [], tmp_path, which="all", batch=1)
