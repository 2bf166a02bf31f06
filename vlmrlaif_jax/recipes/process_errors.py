"""Notes of errors, by which the processes of a run explain each other's end.

A process that fails writes WORKDIR/error_of_process_N.txt. JAX then aborts the others,
whose parents (launch/supervisor.py) print the notes. Nothing here imports JAX.
"""

import contextlib
import pathlib
import re

from vlmrlaif_jax.core.files import replace_text

NOTE_NAME = re.compile("error_of_process_[0-9]+[.]txt")


def note_error(workdir: pathlib.Path, process: int, error: BaseException) -> None:
  """Writes an error to the workdir, where the parents of other processes read it.

  Args:
    workdir: Folder of the run.
    process: Index of this process.
    error: The error.
  """
  text = f"process {process}: {type(error).__name__}: {error}"
  with contextlib.suppress(OSError):  # The disk itself may be the cause.
    workdir.mkdir(parents=True, exist_ok=True)
    replace_text(workdir / f"error_of_process_{process}.txt", text)


def forget_errors(workdir: pathlib.Path) -> None:
  """Removes the notes of earlier starts; only the holder of the workdir may call it."""
  for path in _list_notes(workdir):
    path.unlink()


def read_errors(workdir: pathlib.Path) -> dict[tuple[str, int], str]:
  """Returns the text of each note by its file name and time in nanoseconds."""
  notes = {}
  for path in _list_notes(workdir):
    with contextlib.suppress(FileNotFoundError):  # A new start has removed it.
      notes[path.name, path.stat().st_mtime_ns] = path.read_text()
  return notes


def _list_notes(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Lists the notes of `note_error`; other files of the user are not among them."""
  return sorted(p for p in workdir.glob("*.txt") if NOTE_NAME.fullmatch(p.name))
