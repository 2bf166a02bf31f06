"""Faults of the machine, such as a full disk, as one line with what to do.

`describe_failure` returns the line and the exit code for an error that ends a run.
"""

import errno
import logging
import os
import pathlib
import re
from typing import NamedTuple

from vlmrlaif_jax.core.errors import (
  EXIT_USER_ERROR,
  ResumableError,
  UserError,
  iterate_causes,
)
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE


class Fault(NamedTuple):
  """A kind of fault."""

  name: str  # Description for users.
  remedy: str  # What the user does.
  code: int  # Exit code of the program.


_OWNER = "Change its owner or its mode, or give another --workdir"
_PLACE = "Give the path of a folder, or of one that does not exist yet"
MACHINE_FAULTS = {
  errno.ENOSPC: Fault(
    "no space or no inodes left on the disk",
    "Free space (df -h and df -i show it), then run the same command to resume",
    EXIT_RESUMABLE,
  ),
  errno.EDQUOT: Fault(
    "the disk quota is exceeded",
    "Free space (quota -s shows it), then run the same command to resume",
    EXIT_RESUMABLE,
  ),
  errno.EFBIG: Fault(
    "a file is larger than the file system or ulimit -f allows",
    "Raise the limit, then run the same command to resume",
    EXIT_RESUMABLE,
  ),
  errno.EIO: Fault(
    "the disk reports an input/output error",
    "Check the disk (dmesg), then run the same command to resume",
    EXIT_RESUMABLE,
  ),
  errno.ESTALE: Fault(
    "the network file system lost a file",
    "Check the mount, then run the same command to resume",
    EXIT_RESUMABLE,
  ),
  errno.EMFILE: Fault(
    "too many files are open",
    "Raise ulimit -n, then run the same command to resume",
    EXIT_RESUMABLE,
  ),
  errno.ENOMEM: Fault(
    "the memory of the host is exhausted",
    "The same command fails again: first end other programs, or raise ulimit -v or the "
    "limit of the container",
    EXIT_USER_ERROR,
  ),
  errno.EROFS: Fault(
    "the file system is read-only",
    "Mount it writable or give another --workdir; the same command then resumes",
    EXIT_USER_ERROR,
  ),
  errno.EACCES: Fault("permission denied", _OWNER, EXIT_USER_ERROR),
  errno.EPERM: Fault("the operation is not permitted", _OWNER, EXIT_USER_ERROR),
  errno.ENAMETOOLONG: Fault(
    "the path is too long", "Give a shorter --workdir", EXIT_USER_ERROR
  ),
  errno.ENOTDIR: Fault("a file is where a folder must be", _PLACE, EXIT_USER_ERROR),
  errno.EEXIST: Fault(
    "a file or a dangling link is where a folder must be", _PLACE, EXIT_USER_ERROR
  ),
  errno.EISDIR: Fault(
    "a folder is where a file must be", "Remove it, then resume", EXIT_USER_ERROR
  ),
  errno.ELOOP: Fault("a symbolic link leads to itself", _PLACE, EXIT_USER_ERROR),
}
# Faults that errors of other types contain only as a text, such as those of Orbax.
FAULT_TEXTS = {
  os.strerror(number): number for number in MACHINE_FAULTS if number != errno.EEXIST
}
INTACT = "Finished stages and the steps and blocks that were saved before are intact"
_QUOTED_PATH = re.compile(r"[\"'](/[^\"']+)[\"']")


def describe_failure(
  error: BaseException, root: pathlib.Path
) -> tuple[str, int] | None:
  """Returns the line and the exit code for an error that ends a run.

  Args:
    error: The error.
    root: The workdir.

  Returns:
    None for an error that needs a traceback, because its cause is not known.
  """
  if isinstance(error, UserError):
    is_resumable = isinstance(error, ResumableError)
    return str(error), EXIT_RESUMABLE if is_resumable else EXIT_USER_ERROR
  for each in iterate_causes(error):
    number, path = _find_fault(each)
    if number is not None:
      return _format_fault(MACHINE_FAULTS[number], path, root.absolute())
  return None


def describe_thread_failure(error: BaseException) -> str | None:
  """Returns the line for an error that ends only a thread; None if unknown."""
  number, path = _find_fault(error)
  return (
    None
    if number is None
    else f"warning: {MACHINE_FAULTS[number].name}: {path or error}"
  )


def is_no_fault(record: logging.LogRecord) -> bool:
  """Returns False for a log record with the traceback of a fault of the machine."""
  error = record.exc_info and record.exc_info[1]
  return not error or all(_find_fault(x)[0] is None for x in iterate_causes(error))


def _format_fault(fault: Fault, path: str, root: pathlib.Path) -> tuple[str, int]:
  is_inside = path and pathlib.Path(path).absolute().is_relative_to(root)
  place = (
    path if is_inside else f"{path} (the workdir is {root})" if path else str(root)
  )
  saved = f" {INTACT}." if os.path.isdir(root) else ""
  return f"{fault.name}: {place}.{saved} {fault.remedy}.", fault.code


def _find_fault(error: BaseException) -> tuple[int | None, str]:
  """Returns the number of a fault, None for another error, and its path."""
  text = str(error)
  if isinstance(error, MemoryError):
    return errno.ENOMEM, ""
  if isinstance(error, OSError):
    # Of a replaced or renamed file, the new path is the one that the user knows.
    path = error.filename2 or error.filename or ""
    number = error.errno if error.errno in MACHINE_FAULTS else None
    return number, os.fsdecode(path) if isinstance(path, str | bytes) else ""
  numbers = [number for words, number in FAULT_TEXTS.items() if words in text]
  paths = _QUOTED_PATH.findall(text)
  return (numbers[0], paths[0] if paths else "") if numbers else (None, "")
