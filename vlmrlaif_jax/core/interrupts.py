"""What minds a stage from outside: whether it is to end, and which steps are traced."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

# The exit code (EX_TEMPFAIL) of a run that resumes when it is started again.
EXIT_RESUMABLE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0  # Seconds within which two signals are one.
Made = TypeVar("Made")


class Stopped(Exception):
  """A run that ended because it was asked to; it says what is done and kept."""


class StageMonitor(NamedTuple):
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


NO_MONITOR = StageMonitor()


class StopSignal:
  """Whether this process was asked to end, by SIGTERM or Ctrl-C (SIGINT).

  The first signal is noted, for a stage to finish its step; a second ends the process
  at once. A thread of its own hears them: the main one may be in a compiler for long.

  Args:
    agreed: whether any process was asked, from whether this one was.
  """

  def __init__(self, agreed: Callable[[bool], bool] = lambda asked: asked):
    self.signal = ""  # The name of the first.
    self._agreed = agreed

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
    print(
      f"{self.signal}: this step is finished and saved, then the run ends; "
      "a second signal ends it at once",
      flush=True,
    )
    # A scheduler may signal a process and its parent, which passes it on.
    again = (n for n in ours if time.monotonic() - first > SAME_S)
    os._exit(128 + next(again))
