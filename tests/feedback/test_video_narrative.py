"""Clips, captions and narratives: each frame in one clip, each clip captioned once."""

import pytest

from vlmrlaif_jax.core.jsonl import append_jsonl
from vlmrlaif_jax.feedback import video_narrative
from vlmrlaif_jax.feedback.video_narrative import Clip


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
  assert video_narrative.clip_spans(frames, clip_frames) == spans


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
  found = video_narrative.CONTEXTS[mode]([(i, i + 1) for i in range(count)])
  assert [start for start, _ in found] == chosen


# Captions. The captioner names the frames it was shown.


def asking(calls):
  def ask(clips):
    calls.append(list(clips))
    return [f"{c.video}{c.start}-{c.stop}." for c in clips]

  return ask


SPANS = [(0, 2), (2, 4), (4, 5)]


def test_narrative_is_in_order_of_time(tmp_path):
  told = video_narrative.describe(
    ["b", "a"], SPANS, asking([]), tmp_path / "captions.jsonl"
  )
  assert told == ["b0-2. b2-4. b4-5.", "a0-2. a2-4. a4-5."]


def test_narrative_joins_captions_and_skips_empty_ones(tmp_path):
  captions = iter(["A ball rolls. ", "", " It stops."])
  ask = lambda clips: [next(captions) for _ in clips]
  spans = [(0, 2), (2, 4), (4, 6)]
  told = video_narrative.describe(["a"], spans, ask, tmp_path / "captions.jsonl")
  assert told == ["A ball rolls. It stops."]


def test_clips_of_one_length_are_asked_for_together(tmp_path):
  calls = []
  video_narrative.describe(
    ["a", "b"], SPANS, asking(calls), tmp_path / "captions.jsonl"
  )
  assert calls == [
    [Clip("a", 4, 5), Clip("b", 4, 5)],
    [Clip("a", 0, 2), Clip("a", 2, 4), Clip("b", 0, 2), Clip("b", 2, 4)],
  ]


def test_clip_is_captioned_once(tmp_path):
  path, calls = tmp_path / "captions.jsonl", []
  first = video_narrative.describe(["a", "a"], SPANS[:1], asking(calls), path)
  again = video_narrative.describe(["a"], SPANS[:1], asking(calls), path)
  assert (calls, first, again) == ([[Clip("a", 0, 2)]], ["a0-2."] * 2, ["a0-2."])


def test_caption_that_was_cut_short_is_made_again(tmp_path):
  path, calls = tmp_path / "captions.jsonl", []
  append_jsonl(path, [{"video": "a", "start": 0, "stop": 2, "caption": "whole"}])
  with path.open("a") as file:
    file.write('{"video": "a", "start": 2, "st')
  assert video_narrative.describe(["a"], SPANS[:2], asking(calls), path) == [
    "whole a2-4."
  ]
  assert calls == [[Clip("a", 2, 4)]]


def test_no_spans_tell_nothing(tmp_path):
  calls = []
  told = video_narrative.describe(
    ["a", "b"], [], asking(calls), tmp_path / "captions.jsonl"
  )
  assert (told, calls) == (["", ""], [])
