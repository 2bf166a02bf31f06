"""Seconds by what they went into: sampling, scoring, updates, saving.

The clock is the host's. JAX returns before a device is done, so a phase that is to
hold the device's time must end by waiting for what it made.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

IDLE_PHASE = "idle"  # What is in no phase: the device has nothing to do.


class PhaseTimer:
  """A clock of phases. One within another stops the outer one."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._names = [IDLE_PHASE]
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

  def take_seconds(self) -> dict[str, float]:
    """Seconds of each phase since this was asked last."""
    self._book()
    seconds, self._seconds = self._seconds, {}
    idle = seconds.pop(IDLE_PHASE, 0.0)
    return {**seconds, IDLE_PHASE: idle}

  def _book(self) -> None:
    now, name = self._clock(), self._names[-1]
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
    self._since = now


def format_shares(seconds: Mapping[str, float]) -> str:
  """Formats shares of at least 2 %, the largest first: "sample 61% score 20%"."""
  total = sum(seconds.values()) or 1.0
  found = sorted(seconds.items(), key=lambda item: -item[1])
  return " ".join(f"{name} {s / total:.0%}" for name, s in found if s / total >= 0.02)


class ProfilerTrace:
  """A trace of some steps of a stage, by jax.profiler; a context manager.

  Args:
    steps: those traced; the first of a stage is 0.
    folder: where it is written.
    note: takes a line of text that says where it is.
  """

  def __init__(self, steps: range, folder: str, note: Callable[[str], None]):
    self.steps, self.folder, self._note = steps, folder, note
    self._on = False

  def __enter__(self) -> "ProfilerTrace":
    return self

  def __exit__(self, *_) -> None:
    if self._on:  # The stage ended within the steps, or failed.
      self._write()

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    if number in self.steps and not self._on:
      jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
      self._on = True
    with jax.profiler.StepTraceAnnotation("step", step_num=number):
      yield
    if self._on and number + 1 not in self.steps:
      self._write()

  def _write(self) -> None:
    jax.block_until_ready(jax.live_arrays())  # Devices may be behind the host.
    jax.profiler.stop_trace()
    self._on = False
    self._note(
      f"trace: {self.folder}/plugins/profile; open the perfetto_trace.json.gz in it at "
      "https://ui.perfetto.dev, or all of it in TensorBoard with its profile plugin"
    )
