"""Seconds by what they went into: sampling, scoring, updates, saving.

The clock is the host's. JAX returns before a device is done, so a phase that is to
hold the device's time must end by waiting for what it made.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

IDLE = "idle"  # What is in no phase: the device has nothing to do.


class Phases:
  """A clock of phases. One within another stops the outer one."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._names = [IDLE]
    self._seconds: dict[str, float] = {}
    self._since = clock()

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    """Books what passes within it; a trace shows it under its name."""
    self._book()
    self._names.append(name)
    try:
      with jax.profiler.TraceAnnotation(name):
        yield
    finally:
      self._book()
      self._names.pop()

  def taken(self) -> dict[str, float]:
    """Seconds of each phase since this was asked last."""
    self._book()
    seconds, self._seconds = self._seconds, {}
    idle = seconds.pop(IDLE, 0.0)
    return {**seconds, IDLE: idle}

  def _book(self) -> None:
    now, name = self._clock(), self._names[-1]
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
    self._since = now


def shares(seconds: Mapping[str, float]) -> str:
  """ "sample 61% score 20% update 15%": what takes 2 % and more, in order of size."""
  total = sum(seconds.values()) or 1.0
  found = sorted(seconds.items(), key=lambda item: -item[1])
  return " ".join(f"{name} {s / total:.0%}" for name, s in found if s / total >= 0.02)
