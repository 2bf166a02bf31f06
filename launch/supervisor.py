"""Runs one of several processes as a child and turns its abort into an exit code.

JAX aborts a process from C++ (SIGABRT) when a peer dies or does not appear, even while
the process waits in a collective. Python cannot catch that, and the callback that
jaxlib offers for it ends in `std::bad_cast`. A parent process therefore waits for the
child. JAX's message on stderr names the lost processes. `docs/launching.md` lists the
exit codes. Nothing here imports JAX: only the child may open the devices.
"""

import glob
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE, SIGNALS
from vlmrlaif_jax.recipes import process_errors

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
    workdir: Folder of the run, with notes of errors.
  """
  earlier = process_errors.read_errors(workdir)
  child = subprocess.Popen(
    command,
    # All processes must trace programs in the same order, so sets need a fixed order.
    env={**os.environ, CHILD: "1", "PYTHONHASHSEED": "0"},
    stdin=subprocess.PIPE,  # Closed when this process ends; see `end_with_parent`.
  )
  for number in SIGNALS:
    signal.signal(number, lambda number, frame: child.send_signal(number))
  code = child.wait()
  notes = process_errors.read_errors(workdir)
  failures = [text for key, text in notes.items() if key not in earlier]
  message, code = explain_exit(code, failures)
  if message:
    print(message, file=sys.stderr, flush=True)
  return code


def explain_exit(code: int, failures: Sequence[str]) -> tuple[str, int]:
  """Returns (message, exit code) for the end of a child.

  Args:
    code: Return code of subprocess; negative for a signal.
    failures: Errors of other processes.
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
  if failures:
    lines = ["error: another process failed:", *(f"  {text}" for text in failures)]
    return "\n".join(lines), 1
  return (
    "error: this process was aborted because a peer process was lost, or did not "
    "appear within --start_s; the message of JAX above names it. A process counts as "
    "lost after --heartbeat_s seconds of silence: it was killed, its host was "
    "preempted or the network failed. Start all processes again with the same command "
    "to resume",
    EXIT_RESUMABLE,
  )
