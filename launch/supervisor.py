"""Where there are several processes: runs the program as a child, and tells of its end.

JAX ends the processes that outlive another from C++, in words that help nobody, and
where Python cannot catch it. The parent reads them, says what happened and what to do,
and ends with a code that scripts can act upon:
  0   all is done
  1   an error, here or on another process; to start again would meet it again
  2   refused: the command line, or files that are not there
  3   an alarm has stopped it, and would again
  75  stopped before its end: start all processes again with the same command
  128 + n   this process was ended by signal n
Nothing here imports JAX: the child alone is to see the devices.
"""

import collections
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

AGAIN = 75  # EX_TEMPFAIL, which scripts requeue on.
CHILD = "VLMRLAIF_GUARD"  # Holds the descriptor that the child's guard reads.
# What JAX says when it ends a process, by SIGABRT, that has lost another; and what
# collectives say that end it themselves. Words of libraries alone say nothing: NCCL
# writes of itself all the time.
LOST = re.compile(
  "JAX distributed service detected fatal errors|heartbeat timeout|"
  r"Gloo \S+ failed: .*(closed|reset) by peer|"
  "NCCL operation .* failed: remote process exited"
)
SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)


def in_cluster(env: Mapping[str, str]) -> bool:
  """Whether JAX will find out by itself where this process stands among several.

  On a TPU it also finds out that there is but one.
  """
  several = lambda name: env.get(name, "").isdecimal() and int(env[name]) > 1
  slurm = all(name in env for name in SLURM) and several("SLURM_NTASKS")
  pod = any(
    "," in env.get(name, "")
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
  )
  # A TPU VM that tells nothing by its environment is asked by JAX.
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  vm = bool(chips) and importlib.util.find_spec("libtpu") is not None
  return slurm or pod or several("OMPI_COMM_WORLD_SIZE") or vm


def is_child() -> bool:
  return CHILD in os.environ


def end_with_parent() -> None:
  """Ends this process, the child, as soon as its parent is gone, however that ended."""
  guard = int(os.environ[CHILD])

  def watch():
    os.read(guard, 1)  # Returns when the other end is closed; nothing is written.
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def run(command: Sequence[str], workdir: pathlib.Path, process: int | None) -> int:
  """The exit code of the command, run as a child that is passed SIGTERM and SIGINT.

  Args:
    command: of this process.
    workdir: named in the advice on how to start again.
    process: which one this is; None: JAX will find out.
  """
  guard, held = os.pipe()
  child = subprocess.Popen(
    command,
    # Nothing may depend on the order of a set, which else differs between processes.
    env={**os.environ, CHILD: str(guard), "PYTHONHASHSEED": "0"},
    stderr=subprocess.PIPE,
    pass_fds=[guard],
    start_new_session=True,  # Ctrl-C in a terminal reaches it once, through us.
  )
  os.close(guard)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: child.send_signal(number))
  said: collections.deque[str] = collections.deque(maxlen=400)
  reader = threading.Thread(target=_pass_on, args=(child.stderr, said), daemon=True)
  reader.start()
  code = child.wait()
  reader.join(2)  # Its own children may hold the stream open.
  os.close(held)
  told, code = explain(code, "".join(said), workdir, process)
  if told:
    print(told, file=sys.stderr, flush=True)
  return code


def _pass_on(stream, said: collections.deque) -> None:
  for line in stream:
    sys.stderr.buffer.write(line)
    sys.stderr.flush()
    said.append(line.decode(errors="replace"))


def explain(
  code: int, said: str, workdir: pathlib.Path, process: int | None
) -> tuple[str, int]:
  """(what to tell of the child's end, "" if it has told itself; our own exit code).

  Args:
    code: of subprocess: below 0 for a signal.
    said: the last of its stderr.
    workdir: named in the advice on how to start again.
    process: see `run`.
  """
  if code >= 0:
    return "", code
  here = "this process" if process is None else f"process {process}"
  if -code != signal.SIGABRT or not LOST.search(said):
    name = signal.Signals(-code).name
    more = " (the system does so when memory runs out)" if name == "SIGKILL" else ""
    told = f"error: {here} was ended by {name}{more}"
    # SIGTERM is how schedulers ask for the machine.
    return f"{told}\n{_again(workdir)}", AGAIN if name == "SIGTERM" else 128 - code
  if "RegisterTask" in said:
    return (
      f"error: {here} has waited for the others in vain: not all processes were "
      "started within --start_s, or they cannot reach process 0. Give all the same "
      "--coordinator=HOST:PORT, a host name and a free port of process 0 that the "
      "others can reach, the same --processes, and to each its own --process"
    ), 1
  reasons = errors(workdir)
  told = f"error: {lost_processes(said)} died, and {here} cannot go on alone"
  if reasons:
    return "\n".join([f"{told}:", *reasons]), 1
  return (
    f"{told}. A process is taken for dead after --heartbeat_s seconds of silence: its "
    "host was preempted or lost its network, or the system has killed it (its own log "
    f"tells)\n{_again(workdir)}"
  ), AGAIN


def lost_processes(said: str) -> str:
  """Which processes JAX says have died."""
  found = re.search(r"stopped sending heartbeats\):\s*\n((?:\d+\s*\n)+)", said)
  if found:
    return " and ".join(f"process {number}" for number in found[1].split())
  if "leader task" in said:
    return "process 0"
  return "another process"


def note_error(workdir: pathlib.Path, process: int, error: BaseException) -> None:
  """Leaves word of an error for the parents of the other processes."""
  workdir.mkdir(parents=True, exist_ok=True)
  text = f"{type(error).__name__}: {error}"
  (workdir / f"error_{process}.txt").write_text(text)


def forget_errors(workdir: pathlib.Path) -> None:
  """Removes what note_error has left, before a new start."""
  for path in workdir.glob("error_*.txt"):
    path.unlink()


def errors(workdir: pathlib.Path) -> list[str]:
  """What note_error has left, a line for each process."""
  return [
    f"  process {path.stem.removeprefix('error_')} met {path.read_text()}"
    for path in sorted(workdir.glob("error_*.txt"))
  ]


def _again(workdir: pathlib.Path) -> str:
  return (
    "Start all processes again with the same command: the run goes on from "
    f"{last_step(workdir)}"
  )


def last_step(workdir: pathlib.Path) -> str:
  """The checkpoint that was written last."""
  saved = [
    path
    for path in workdir.glob("*/checkpoints/*")
    if path.name.isdecimal() and not (path.parents[1] / "done.json").exists()
  ]
  if not saved:
    return "the beginning of the stage that it was in"
  last = max(saved, key=lambda path: path.stat().st_mtime)
  return f"step {last.name} of {last.parents[1].name}"
