"""Frames by number of a constant rate, by time of others, by fps, and of a part."""

import numpy as np
import pytest

from vlmrlaif_jax.data.decoding.sampling import (
  ByCount,
  ByFps,
  Timeline,
  choose_frames,
  sample_frame_indices,
  select_frames,
)
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor


def at_rate(rate, total):
  return Timeline(np.arange(total) / rate, total / rate)


def at(*seconds, duration=None):
  return Timeline(np.array(seconds, float), duration or seconds[-1] + 1.0)


@pytest.mark.parametrize("rate", [10, 23.976, 25, 29.97, 30, 59.94])
@pytest.mark.parametrize("unit", [1e-3, 1 / 90_000])  # Matroska's and MPEG-TS's.
def test_constant_rate_is_sampled_by_number_though_times_are_rounded(rate, unit):
  for total in (1, 2, 7, 24, 250, 1799):
    seconds = np.round(np.arange(total) / rate / unit) * unit
    for count in (1, 2, 8, 50, 64):
      found = choose_frames(Timeline(seconds, total / rate), ByCount(count))
      np.testing.assert_array_equal(found, sample_frame_indices(total, count))


def test_variable_rate_is_sampled_by_time():
  """20 frames in the first second, then 20 in 18 seconds: a screen that rests."""
  seconds = [i / 20 for i in range(20)] + [1 + 0.95 * i for i in range(20)]
  found = choose_frames(at(*seconds), ByCount(8))
  expected = [
    max(i for i in range(40) if seconds[i] <= k * seconds[-1] / 7 + 1e-9)
    for k in range(8)
  ]
  assert found.tolist() == expected and sum(seconds[i] <= 1 for i in found) == 1


def test_rate_that_varies_a_little_is_sampled_by_number():
  """60 frames at 25 fps, then 60 at 7.7: no gap is twice as long as an even one."""
  seconds = [0.04 * i if i < 60 else 2.4 + 0.13 * (i - 60) for i in range(120)]
  for count in (12, 50):
    found = choose_frames(at(*seconds), ByCount(count))
    np.testing.assert_array_equal(found, sample_frame_indices(120, count))


def test_frame_that_stays_on_screen_is_repeated():
  assert choose_frames(at(0, 1, 9, 10), ByCount(5)).tolist() == [0, 1, 1, 1, 3]


@pytest.mark.parametrize(
  ("seconds", "expected"),
  [
    (10.0, 20),  # 2 frames a second.
    (0.4, 4),  # At least 4.
    (100.0, 32),  # At most 32.
    (4.99, 9),  # Rounded down.
  ],
)
def test_frames_by_fps_follow_the_duration_within_limits(seconds, expected):
  timeline = at_rate(100, round(100 * seconds))
  found = choose_frames(timeline, ByFps(2.0, 4, 32))
  np.testing.assert_array_equal(
    found, sample_frame_indices(len(timeline.seconds), expected)
  )


@pytest.mark.parametrize(
  ("start", "end", "expected"),
  [
    (1.0, 2.0, [10, 15, 20]),  # Both ends.
    (1.05, 2.05, [10, 15, 20]),  # The frames on screen at the ends.
    (0.0, 0.05, [0, 0, 0]),
    (2.2, float("inf"), [22, 25, 29]),
    (2.95, 99.0, [29, 29, 29]),  # The last frame is on screen until 3 s.
  ],
)
def test_part_contains_both_ends_and_nothing_outside(start, end, expected):
  found = choose_frames(at_rate(10, 30), ByCount(3), start, end)
  assert found.tolist() == expected


def test_fps_counts_the_seconds_of_the_part():
  found = choose_frames(at_rate(10, 300), ByFps(2.0, 1, 99), 5.0, 8.0)
  assert len(found) == 6 and (found[0], found[-1]) == (50, 80)


@pytest.mark.parametrize(
  ("start", "end", "reason"),
  [
    (3.5, 4.0, "starts at 3.5 s, but it lasts 3.000 s"),
    (2.0, 1.0, "from 2 s to 1 s is empty"),
  ],
)
def test_part_outside_of_the_video_is_an_error(start, end, reason):
  with pytest.raises(ValueError, match=reason):
    choose_frames(at_rate(10, 30), ByCount(3), start, end)


def test_last_frame_may_stay_long():
  """A still that is shown for 20 s is on screen at 15 s."""
  assert choose_frames(at(0, 1, duration=20.0), ByCount(2), 15.0).tolist() == [1, 1]


@pytest.mark.parametrize("rate", [10.0, 24000 / 1001, 25.0, 30000 / 1001])
def test_the_rule_of_a_family_counts_frames_of_the_video_at_its_rate(rate):
  rule = Qwen3VLProcessor(fps=2.0, min_frames=2)
  for total in (1, 5, 48, 250):
    found = choose_frames(at_rate(rate, total), rule)
    np.testing.assert_array_equal(found, rule.sample_frames(total, rate))


def test_the_rule_of_a_family_applies_to_a_part():
  found = choose_frames(at_rate(10, 300), Qwen3VLProcessor(min_frames=1), 5.0, 8.0)
  assert found.tolist() == [50, 56, 62, 68, 74, 80]


@pytest.mark.parametrize(
  "timeline, part, want",
  [
    (at_rate(10, 35), (), 6 / 3.5),  # 6 frames of 3.5 seconds, not 5 gaps of 2.9.
    (at_rate(10, 300), (5.0, 7.9), 6 / 3.0),  # Frames 50 to 79.
    (at_rate(30000 / 1001, 60), (), 4 / 60 * (30000 / 1001)),
    (Timeline(np.zeros(1), 0.0), (), 0.0),  # A picture.
  ],
)
def test_rate_is_the_number_of_frames_that_a_second_of_the_part_has(
  timeline, part, want
):
  selected = select_frames(timeline, Qwen25VLProcessor(), *part)
  assert selected.rate == pytest.approx(want, rel=1e-12)
  assert selected.seconds == timeline.seconds[selected.numbers].tolist()
