"""What minds a stage from outside: whether it is to end, and which steps are traced."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax

STOPPED = 75  # The exit code EX_TEMPFAIL: schedulers may start the run again.
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0  # Seconds within which two signals are one.
Made = TypeVar("Made")


class Stopped(Exception):
  """A run that ended because it was asked to; it says what is done and kept."""


class Watch(NamedTuple):
  """What a stage asks between its steps."""

  # Whether to end now. Every process asks once a step, and all hear the same.
  stop: Callable[[], bool] = lambda: False
  # Stands around each step, given its number.
  step: Callable[[int], contextlib.AbstractContextManager] = lambda number: (
    contextlib.nullcontext()
  )

  def check(self, done: str) -> None:
    """Ends a run that is to end.

    Args:
      done: what stands on disk, in words.

    Raises:
      Stopped: it is.
    """
    if self.stop():
      raise Stopped(done)

  def blocks(self, make: Callable[[range], Made]) -> Callable[[range], Made]:
    """`make` for blocks that are kept as they are made: a run can end before each.

    They are the steps of a trace, counted from the first that is made.
    """
    numbers = itertools.count()

    def watched(block: range) -> Made:
      self.check(f"the {block.start} rows before this block are kept")
      with self.step(next(numbers)):
        return make(block)

    return watched


NO_WATCH = Watch()


class Stop:
  """Whether this process was asked to end, by SIGTERM or Ctrl-C (SIGINT).

  The first signal is noted, for a stage to finish its step; a second ends the process
  at once. A thread of its own hears them: the main one may be in a compiler for long.

  Args:
    agreed: whether any process was asked, from whether this one was.
    say: takes a line of text.
  """

  def __init__(
    self,
    agreed: Callable[[bool], bool] = lambda asked: asked,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
  ):
    self.signal = ""  # The name of the first.
    self._agreed, self._say = agreed, say

  def __call__(self) -> bool:
    return self._agreed(bool(self.signal))

  def install(self) -> None:
    """Takes the signals over from now on; to be called in the main thread.

    jax.distributed takes SIGTERM for itself: initialise it first.
    """
    heard, written = os.pipe()
    os.set_blocking(written, False)
    for number in SIGNALS:
      signal.signal(number, lambda *_: None)  # Else Python would not pass it on.
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

  def _listen(self, heard: int) -> None:
    ours = (number for number in iter(lambda: os.read(heard, 1)[0], None))
    ours = (number for number in ours if number in SIGNALS)
    self.signal = signal.Signals(next(ours)).name
    first = time.monotonic()
    self._say(
      f"{self.signal}: this step is finished and saved, then the run ends; "
      "a second signal ends it at once"
    )
    # A scheduler may signal a process and its parent, which passes it on.
    again = (n for n in ours if time.monotonic() - first > SAME_S)
    os._exit(128 + next(again))


class Trace:
  """A trace of some steps of a stage, by jax.profiler; a context manager.

  Args:
    steps: those traced; the first of a stage is 0.
    folder: where it is written.
    note: takes a line of text that says where it is.
  """

  def __init__(self, steps: range, folder: str, note: Callable[[str], None]):
    self.steps, self.folder, self._note = steps, folder, note
    self._on = False

  def __enter__(self) -> "Trace":
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


def steps_of(text: str) -> range:
  """The steps that "3", "3-5" or "" (none) speaks of.

  Raises:
    ValueError: it speaks of none.
  """
  if not text:
    return range(0)
  first, _, last = text.partition("-")
  if first.isdecimal() and (last or first).isdecimal():
    steps = range(int(first), int(last or first) + 1)
    if steps:
      return steps
  raise ValueError(f'--trace must be a step, as "3", or some, as "3-5", not {text!r}')
