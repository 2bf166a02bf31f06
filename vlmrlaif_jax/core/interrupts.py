"""Stop requests by signal, and the hooks that a stage calls between its steps.

`StopSignal` handles SIGTERM and Ctrl-C. A stage receives a `StageMonitor`, which it
checks after each step.
"""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from vlmrlaif_jax.core.errors import note_place

# Exit code (EX_TEMPFAIL) of a stopped run, which the same command resumes.
EXIT_RESUMABLE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
DUPLICATE_S = 1.0  # Seconds within which two signals count as one.
Rows = TypeVar("Rows")


class Stopped(Exception):
  """A requested stop of a run; the message states what is saved."""


class StageMonitor(NamedTuple):
  """Hooks that a stage calls between its steps."""

  # Returns whether to stop now. Every process calls it once per step, and all of them
  # get the same result.
  stop: Callable[[], bool] = lambda: False
  # Returns the context manager in which the step of a given number runs.
  step: Callable[[int], contextlib.AbstractContextManager] = lambda number: (
    contextlib.nullcontext()
  )

  def check(self, done: str) -> None:
    """Ends the run if a stop is requested.

    Args:
      done: Description of what is saved on disk.

    Raises:
      Stopped: A stop is requested.
    """
    if self.stop():
      raise Stopped(done)

  def wrap_blocks(self, make: Callable[[range], Rows]) -> Callable[[range], Rows]:
    """Wraps the function that computes blocks of rows, so that a run can stop between.

    Each block is one step of a profiler trace, counted from the first computed block.
    """
    numbers = itertools.count()

    def watched(block: range) -> Rows:
      self.check(f"the {block.start} rows before this block are saved")
      rows = f"rows {block.start} to {block.stop - 1}"
      with self.step(next(numbers)), note_place(rows):
        return make(block)

    return watched


NO_MONITOR = StageMonitor()


class StopSignal:
  """A stop request by SIGTERM or Ctrl-C (SIGINT); calling it returns whether it came.

  After the first signal a stage finishes its step. A second signal ends the process
  immediately. A separate thread receives signals, because the main thread may be in a
  compiler for minutes.

  Args:
    agreed: Maps this process's request to whether any process has one.
  """

  def __init__(self, agreed: Callable[[bool], bool] = lambda requested: requested):
    self.signal = ""  # Name of the first signal.
    self._agreed = agreed

  def __call__(self) -> bool:
    """Returns whether any process received a signal."""
    return self._agreed(bool(self.signal))

  def install(self) -> None:
    """Installs the signal handlers. Must run in the main thread.

    jax.distributed installs its own handler of SIGTERM: initialize it first.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
      signal.signal(number, lambda *_: None)  # Python then writes it to the pipe.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

  def _listen(self, reader: int) -> None:
    received = (number for number in iter(lambda: os.read(reader, 1)[0], None))
    received = (number for number in received if number in SIGNALS)
    self.signal = signal.Signals(next(received)).name
    first = time.monotonic()
    print(
      f"{self.signal}: this step is finished and saved, then the run ends; "
      "a second signal ends it immediately",
      flush=True,
    )
    # A scheduler may signal a process and its parent, which forwards the signal.
    later = (n for n in received if time.monotonic() - first > DUPLICATE_S)
    os._exit(128 + next(later))
