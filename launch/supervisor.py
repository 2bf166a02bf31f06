"""Runs one of several processes as a child and turns its abort into an exit code.

JAX aborts a process from C++ (SIGABRT) when a peer dies or does not appear, even while
the process waits in a collective. Python cannot catch that, and the callback that
jaxlib offers for it ends in `std::bad_cast`. A parent process therefore waits for the
child. JAX's message on stderr names the lost processes. `docs/launching.md` lists the
exit codes. Nothing here imports JAX: only the child may open the devices.
"""

import contextlib
import glob
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from vlmrlaif_jax.core.files import replace_text
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE, SIGNALS

CHILD = "VLMRLAIF_CHILD"  # Set in the environment of the child.
SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)


def is_in_cluster(env: Mapping[str, str]) -> bool:
  """Returns whether JAX finds the number of processes by itself.

  On a TPU VM JAX also finds that there is only one process.
  """
  several = lambda name: env.get(name, "").isdecimal() and int(env[name]) > 1
  slurm = all(name in env for name in SLURM) and several("SLURM_NTASKS")
  pod = any(
    "," in env.get(name, "")
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
  )
  # Some TPU VMs set no variable; JAX queries their metadata server.
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  vm = bool(chips) and importlib.util.find_spec("libtpu") is not None
  return slurm or pod or several("OMPI_COMM_WORLD_SIZE") or vm


def is_child() -> bool:
  """Returns whether this process was started by `run_child`."""
  return CHILD in os.environ


def end_with_parent() -> None:
  """Ends this process, the child, when its parent ends for any reason."""

  def watch():
    os.read(sys.stdin.fileno(), 1)  # Returns at end of file; nothing is written.
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def run_child(command: Sequence[str], workdir: pathlib.Path) -> int:
  """Runs a command as a child, forwards SIGTERM and SIGINT, and returns the exit code.

  Args:
    command: Command line of this process.
    workdir: Folder of the notes by `note_error`.
  """
  child = subprocess.Popen(
    command,
    # All processes must trace programs in the same order, so sets need a fixed order.
    env={**os.environ, CHILD: "1", "PYTHONHASHSEED": "0"},
    stdin=subprocess.PIPE,  # Closed when this process ends; see `end_with_parent`.
  )
  for number in SIGNALS:
    signal.signal(number, lambda number, frame: child.send_signal(number))
  message, code = explain_exit(child.wait(), workdir)
  if message:
    print(message, file=sys.stderr, flush=True)
  return code


def explain_exit(code: int, workdir: pathlib.Path) -> tuple[str, int]:
  """Returns (message, exit code) for the end of a child.

  Args:
    code: Return code of subprocess; negative for a signal.
    workdir: Folder of the notes by `note_error`.
  """
  if code >= 0:
    return "", code  # The child has printed its own message.
  name = signal.Signals(-code).name
  if -code != signal.SIGABRT:
    return (
      f"error: this process was killed by {name} (SIGKILL: often out of host memory). "
      "Start all processes again with the same command to resume",
      128 - code,
    )
  if failures := _read_errors(workdir):
    return "\n".join(["error: another process failed:", *failures]), 1
  return (
    "error: this process was aborted because a peer process was lost, or did not "
    "appear within --start_s; the message of JAX above names it. A process counts as "
    "lost after --heartbeat_s seconds of silence: it was killed, its host was "
    "preempted or the network failed. Start all processes again with the same command "
    "to resume",
    EXIT_RESUMABLE,
  )


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
  """Removes the notes of `note_error` before a new start."""
  for path in _list_notes(workdir):
    path.unlink()


def _read_errors(workdir: pathlib.Path) -> list[str]:
  return [f"  {path.read_text()}" for path in _list_notes(workdir)]


def _list_notes(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Lists the notes of `note_error`; other files of the user are not among them."""
  name = re.compile("error_of_process_[0-9]+[.]txt")
  return sorted(p for p in workdir.glob("*.txt") if name.fullmatch(p.name))
