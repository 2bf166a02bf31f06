"""Seconds by phase, by a clock that the test sets."""

from vlmrlaif_jax.core.profiling import PhaseTimer, format_shares


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_each_second_is_of_one_phase():
  clock = Clock()
  phases = PhaseTimer(clock)
  clock.now += 1
  with phases("sample"):
    clock.now += 2
    with phases("score"):
      clock.now += 4
    clock.now += 8
  with phases("score"):
    clock.now += 16
  assert phases.take_seconds() == {"sample": 10, "score": 20, "idle": 1}


def test_what_was_taken_is_not_taken_again():
  clock = Clock()
  phases = PhaseTimer(clock)
  with phases("update"):
    clock.now += 2
    assert phases.take_seconds() == {"update": 2, "idle": 0}
    clock.now += 3
  assert phases.take_seconds() == {"update": 3, "idle": 0}


def test_a_phase_that_fails_is_over():
  clock = Clock()
  phases = PhaseTimer(clock)
  try:
    with phases("save"):
      clock.now += 1
      raise OSError
  except OSError:
    clock.now += 2
  assert phases.take_seconds() == {"save": 1, "idle": 2}


def test_shares_name_what_takes_long_first():
  seconds = {"data": 0.001, "update": 1.5, "sample": 6.1, "score": 2.0, "idle": 0.399}
  assert format_shares(seconds) == "sample 61% score 20% update 15% idle 4%"


def test_shares_of_no_time_are_none():
  assert format_shares({"idle": 0.0}) == ""
