"""Clips, captions and narratives: each frame in one clip, each clip captioned once."""

import pathlib

import pytest
from ml_collections import ConfigDict

from tests.helpers import qwen
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.jsonl import append_jsonl, read_intact_rows
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.features import FeatureStore
from vlmrlaif_jax.data.processors.interface import Grid, Visual
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


def make_run(processor, layouts, **label):
  """A run without a model, about videos of these layouts, in clips of four frames."""
  label = (
    dict(caption_prompt_len=99, caption_max_new=8, caption_temperature=0.0) | label
  )
  config = dict(seed=0, model=dict(clip_frames=4, prompts="brief"), label=label)
  files = {name: pathlib.Path(f"{name}.npy") for name in layouts}
  return Run(**dict.fromkeys(Run._fields))._replace(
    config=ConfigDict(config),
    processor=processor,
    features=FeatureStore(files, layouts, {}, {}),
    tokenizer=qwen.make_tokenizer(),
    template=tokenization.get_template("chat_template"),
  )


def make_examples(videos):
  return [{"id": f"{video}_1", "video": video} for video in videos]


@pytest.fixture
def narratives(tmp_path, monkeypatch):
  """A function of videos to their narratives; `calls` has the clips of each call."""

  def answer(run, variables, queries, sampling, *, seed):
    if queries:
      told.calls.append([(q.video, q.start, q.stop) for q in queries])
    return [[VideoReply(told.say(q), True)] for q in queries]

  def told(videos, frames=5):
    processor = LlavaProcessor(frames, image=16, patch=4)
    run = make_run(processor, dict.fromkeys(videos, processor.layout))
    run.config.model.clip_frames = 2
    return tell(run, videos)

  def tell(run, videos):
    examples = make_examples(videos)
    return captioning.caption_videos(run, {}, examples, told.path, which="all", batch=4)

  told.path, told.calls, told.tell = tmp_path / "captions.jsonl", [], tell
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
  assert read_intact_rows(narratives.path) == ([caption], {})


def test_caption_that_was_cut_short_is_made_again(narratives):
  caption = {"video": "a", "start": 0, "stop": 2, "caption": "whole"}
  append_jsonl(narratives.path, [caption])
  with narratives.path.open("a") as file:
    file.write('{"video": "a", "start": 2, "st')
  assert narratives(["a"], frames=4) == ["whole a2-4."]
  assert narratives.calls == [[("a", 2, 4)]]


def test_no_videos_tell_nothing(narratives):
  assert (narratives([]), narratives.calls) == ([], [])


# Videos with layouts of their own: temporal patches of two frames, one in a second.


def make_layout(patches):
  seconds = tuple(i / 2 for i in range(2 * patches - patches % 2))
  return Visual(Grid(patches, 8, 8), seconds, 2.0)


LAYOUTS = {"short": make_layout(1), "odd": make_layout(3), "long": make_layout(4)}


def test_clips_of_videos_with_layouts_of_their_own_are_temporal_patches(narratives):
  run = make_run(Qwen3VLProcessor(), LAYOUTS)
  assert narratives.tell(run, LAYOUTS) == [
    "short0-1.", "odd0-2. odd2-3.", "long0-2. long2-4."
  ]  # fmt: skip
  (asked,) = narratives.calls  # Of one shape, whatever the lengths.
  assert len(asked) == 5


def test_a_clip_has_one_patch_where_that_has_more_frames():
  run = make_run(Qwen3VLProcessor(), LAYOUTS)
  run.config.model.clip_frames = 1
  clips = captioning.select_clips(run, "odd", "all")
  assert [clip[1:] for clip in clips] == [(0, 1), (1, 2), (2, 3)]


def test_clips_have_the_times_of_the_video():
  run = make_run(Qwen3VLProcessor(), LAYOUTS)
  (*_, last) = captioning.select_clips(run, "long", "all")
  text = run.lay_out_video("long", last.start, last.stop).texts[0]
  assert [part for part in text if "seconds" in str(part)] == [
    "<2.2 seconds><|vision_start|>", "<3.2 seconds><|vision_start|>"
  ]  # fmt: skip


def test_prompt_that_does_not_fit_is_an_error_that_names_its_record(narratives):
  run = make_run(Qwen3VLProcessor(), LAYOUTS)
  tokens = run.lay_out_video("odd", 0, 2)
  row = answering.encode_prompt(run, [(run.prompts.caption, None)], tokens)
  run.config.label.caption_prompt_len = len(row.ids)
  examples = make_examples(LAYOUTS)
  captioning.check_clips(run, examples, "all")
  run.config.label.caption_prompt_len -= 1
  said = f"{len(row.ids)} tokens for the clip 0-2 of the video of odd_1"
  with pytest.raises(UserError, match=said):
    captioning.check_clips(run, examples, "all")
  with pytest.raises(UserError, match=said):
    narratives.tell(run, LAYOUTS)
  assert narratives.calls == []
