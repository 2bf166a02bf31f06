"""Failures that no code of a run can catch: how the launcher prints them.

They happen in threads and in callbacks of libraries, or are warnings that repeat.
"""

import os
import re
import sys
import threading
import warnings
from typing import Any, NoReturn

from absl import logging

from vlmrlaif_jax.core.errors import EXIT_USER_ERROR

UNCACHED = re.compile("Error (writing|reading) persistent compilation cache entry")


def install_handlers() -> None:
  """Installs the functions of this module where Python calls them."""
  from vlmrlaif_jax.recipes import machine_faults  # The import takes seconds.

  threading.excepthook = print_thread_failure
  sys.unraisablehook = print_unraisable_error
  warnings.showwarning = make_show_warning()
  # Orbax logs the traceback of a full disk in a thread, and then raises the error.
  logging.get_absl_logger().addFilter(machine_faults.is_no_fault)


def print_thread_failure(failed: threading.ExceptHookArgs) -> None:
  """Prints an error that ends a thread; faults of the machine have no traceback."""
  from vlmrlaif_jax.recipes import machine_faults

  line = failed.exc_value and machine_faults.describe_thread_failure(failed.exc_value)
  if line:
    print(line, file=sys.stderr, flush=True)
  else:
    threading.__excepthook__(failed)


def print_unraisable_error(failed: "sys.UnraisableHookArgs") -> None:
  """Prints an error that no code can catch, as Python does.

  After a failed save, the storage of Orbax calls back into an event loop that the save
  has closed. The error of the save itself is printed.
  """
  if str(failed.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(failed)


def make_show_warning() -> Any:
  """Returns a `warnings.showwarning` that shows the first failure of JAX's cache only.

  JAX warns about each of a hundred programs that it cannot cache.
  """
  show_next, has_warned = warnings.showwarning, False

  def show(message, *place, **more):
    nonlocal has_warned
    if not UNCACHED.match(str(message)):
      show_next(message, *place, **more)
    elif not has_warned:
      has_warned = True
      print(
        f"warning: compiled programs are not cached: {message}. Later starts compile "
        "again. Free space, or set JAX_COMPILATION_CACHE_DIR to a folder that you can "
        "write",
        file=sys.stderr,
        flush=True,
      )

  return show


def end_taken_run(error: Exception) -> NoReturn:
  """Ends this process before it writes into the workdir that another run has."""
  print(f"error: {error}", file=sys.stderr, flush=True)
  os._exit(EXIT_USER_ERROR)
