"""Timing of phases (sampling, scoring, updates, saving), and profiler traces.

`PhaseTimer` reads the host's clock. JAX dispatches asynchronously, so a phase measures
device time only if it ends by waiting for its results.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from vlmrlaif_jax.core.errors import note_place

IDLE_PHASE = "idle"  # Time outside of all phases, in which the device has no work.


class PhaseTimer:
  """A timer of phases. A nested phase pauses the outer one."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._names = [IDLE_PHASE]
    self._seconds: dict[str, float] = {}
    self._since = clock()

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    """Times the block; profiler traces show it under the phase's name."""
    self._add_elapsed()
    self._names.append(name)
    try:
      with jax.profiler.TraceAnnotation(name), note_place(f"the phase {name!r}"):
        yield
    finally:
      self._add_elapsed()
      self._names.pop()

  def take_seconds(self) -> dict[str, float]:
    """Returns the seconds of each phase and resets the timer."""
    self._add_elapsed()
    seconds, self._seconds = self._seconds, {}
    idle = seconds.pop(IDLE_PHASE, 0.0)
    return {**seconds, IDLE_PHASE: idle}

  def _add_elapsed(self) -> None:
    now, name = self._clock(), self._names[-1]
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
    self._since = now


def format_shares(seconds: Mapping[str, float]) -> str:
  """Formats shares of at least 2 %, the largest first: "sample 61% score 20%"."""
  total = sum(seconds.values()) or 1.0
  ordered = sorted(seconds.items(), key=lambda item: -item[1])
  return " ".join(f"{name} {s / total:.0%}" for name, s in ordered if s / total >= 0.02)


class ProfilerTrace:
  """A context manager that traces some steps of a stage with jax.profiler.

  Args:
    steps: Steps to trace; the first step of a stage is 0.
    folder: Output folder of the trace.
    note: Receives a line that names the file of the trace.
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
    """Runs a step, and starts or ends the trace around it."""
    if number in self.steps and not self._on:
      jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
      self._on = True
    with jax.profiler.StepTraceAnnotation("step", step_num=number):
      yield
    if self._on and number + 1 not in self.steps:
      self._write()

  def _write(self) -> None:
    jax.block_until_ready(jax.live_arrays())  # Waits for asynchronous computations.
    jax.profiler.stop_trace()
    self._on = False
    self._note(
      f"trace: {self.folder}/plugins/profile; open its perfetto_trace.json.gz at "
      "https://ui.perfetto.dev, or the folder in TensorBoard with the profile plugin"
    )
