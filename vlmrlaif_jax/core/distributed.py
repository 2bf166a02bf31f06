"""Several processes, as a rule one on each host, that run one program together.

Every process runs the same stages in the same order and comes to the same decisions.
Each reads, decodes and stacks its own rows of each batch alone (`mine`). What comes of
a batch, such as tokens and scores, is on all of them (`fetch`). What depends on a disk
or on a server is found out once and told to all (`once`, `spread`). Process 0 writes.
The workdir is on a file system that all of them share.

`fetch`, `share`, `once`, `spread`, `agreed` and `check_same` wait for the other
processes: all are to call them, in the same order, and never from a thread beside the
main one. Inside what `share`, `once` or `spread` calls, a process is alone: there they
raise, also in a run of one process.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int, PyTree

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError

# What a collective, or a barrier of a checkpoint, may say that has lost a process; it
# may be any kind of error.
LOST_PEER = re.compile(
  r"Gloo \S+ failed|NCCL|(closed|reset) by peer|Socket closed|heartbeat timeout"
)
DEAD_PEER = "heartbeat timeout"  # The one of them that JAX says when it knows.
SHORTEST = 1024  # Bytes of a message; each length is compiled once, so few are used.
_ALONE = ContextVar("alone", default=False)  # Whether `share` is calling its `make`.


class HostError(UserError):
  """What another process came to, or why the processes do not find each other."""


def connect_processes(
  coordinator: str | None,
  processes: int | None,
  process: int | None,
  *,
  heartbeat_s: int,
  start_s: int,
) -> None:
  """Joins the other processes; to be called before JAX has seen a device.

  JAX finds out what is None: on TPU pods and under Slurm and Open MPI.

  Args:
    coordinator: HOST:PORT of process 0, which listens there.
    processes: how many there are.
    process: number of this one.
    heartbeat_s: of silence, after which a process is taken for dead. The others are
      then ended from C++, with a message on stderr.
    start_s: how long all may take to appear.
  """
  place = coordinator, processes, process
  # It would take SIGTERM away from Python; see `agreed`.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      *place,
      # Slurm's would give each process but one of a host's devices.
      cluster_detection_method=None if None in place else "deactivate",
      initialization_timeout=start_s,
      heartbeat_timeout_seconds=heartbeat_s,
      shutdown_timeout_seconds=heartbeat_s,
    )
  except (RuntimeError, ValueError) as error:
    raise HostError(
      f"the processes do not find each other: {error}\nGive each --processes, its own "
      "--process, and --coordinator=HOST:PORT of process 0"
    ) from error


def is_process_zero() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def process_index() -> int:
  """Which process this is, from 0."""
  return jax.process_index()


def is_multiprocess() -> bool:
  """Whether there is more than one process."""
  return jax.process_count() > 1


def print_once(line: str) -> None:
  """Prints a line, once for all processes."""
  if is_process_zero():
    print(line, flush=True)


def fetch_arrays(tree: PyTree) -> PyTree:
  """Whole arrays as NumPy, wherever their parts are."""

  def whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return x
    _check_together("fetch")
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.device_get(jax.tree.map(whole, tree))


def local_rows(count: int, mesh: Mesh) -> Int[np.ndarray, " rows"]:
  """The numbers of the rows that this process has of a batch, which sharding.put takes.

  Args:
    count: rows of the whole batch.
    mesh: of all processes.
  """
  if not is_multiprocess():
    return np.arange(count)
  return sharding.process_row_indices(mesh, jax.process_index(), count)


def allgather_json(make: Callable[[], Any]) -> list[Any]:
  """What each process makes, on all of them, in their order.

  Args:
    make: something that JSON can hold.

  Raises:
    HostError: another process could not make it. That one raises what it met.
    RuntimeError: it is called inside what another call of `share` makes.
  """
  _check_together("share")
  if not is_multiprocess():
    return [_alone(make)]
  met = None
  try:
    own = {"made": _alone(make)}
  except Exception as error:
    met, own = error, {"met": f"{type(error).__name__}: {error}"}
  own["process"] = (
    process_index()
  )  # Devices, and so messages, may come in another order.
  every = [json.loads(told) for told in _exchange(json.dumps(own).encode())]
  every.sort(key=lambda told: told["process"])
  if met is not None:
    raise met
  for told in every:
    if "met" in told:
      raise HostError(f"process {told['process']} of {len(every)} met {told['met']}")
  return [told["made"] for told in every]


def _alone(make: Callable[[], Any]) -> Any:
  token = _ALONE.set(True)
  try:
    return make()
  finally:
    _ALONE.reset(token)


def _check_together(name: str) -> None:
  """Raises if this process is alone: the others would not join, and all would wait."""
  if _ALONE.get():
    raise RuntimeError(
      f"distributed.{name} waits for every process, but is called inside what once, "
      "share or spread makes on some of them: call it before, and use its result there"
    )


def on_process_zero(make: Callable[[], Any]) -> Any:
  """What process 0 makes, on all of them; the others do not call `make`."""
  return allgather_json(make if is_process_zero() else lambda: None)[0]


def local_items(items: Sequence[Any]) -> Sequence[Any]:
  """Those of the items that fall to this process."""
  return items[jax.process_index() :: jax.process_count()]


def map_across_processes(
  make: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]
) -> list:
  """make(items), of which each process makes a part.

  Args:
    make: something for each item, that JSON can hold.
    items: the same in every process.
  """
  parts = allgather_json(lambda: list(make(local_items(items))))
  count = len(parts)
  return [parts[i % count][i // count] for i in range(len(items))]


def any_process(flag: bool) -> bool:
  """Whether the flag is True in any process, and so for all of them."""
  _check_together("agreed")
  if not is_multiprocess():
    return flag
  return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def check_same_config(config: str) -> None:
  """Refuses processes that were started differently.

  Raises:
    HostError: on all of them; their configs differ.
  """
  every = allgather_json(lambda: config)
  others = [number for number, other in enumerate(every) if other != every[0]]
  if others:
    raise HostError(
      f"the config of processes {others} differs from that of process 0: start all "
      "with the same command, but for --process"
    )


def abort_process(
  error: Exception, *, code: int, heartbeat_s: int, note: Callable[[], None]
) -> NoReturn:
  """Ends this process after an error, so that the others learn of it.

  Where the error may be that another has died, JAX is given time to say so.

  A normal end would wait for the others, which wait for this one.

  Args:
    error: printed to stderr.
    code: of the exit.
    heartbeat_s: as given to `start`.
    note: called once it is known that the error is this process's own.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if LOST_PEER.search(str(error)):
    # If another process has died, JAX will end this one soon, and say which it was.
    time.sleep(1.5 * heartbeat_s + 5)
    if DEAD_PEER in str(error):
      os.abort()  # As JAX would have.
    print(
      "error: no process has died, so what is said above would be met again: look to "
      "the network between the hosts, and to the settings of NCCL or Gloo",
      file=sys.stderr,
      flush=True,
    )
  note()
  if is_process_zero():
    # Those that have met the same want to say so; without process 0 they are ended.
    time.sleep(2)
  os._exit(code)


def _exchange(own: bytes) -> list[bytes]:
  """The message of every process, in the order of their devices."""
  lengths = multihost_utils.process_allgather(np.int32(len(own)))
  size = max(SHORTEST, 1 << (int(lengths.max()) - 1).bit_length())
  padded = np.frombuffer(own.ljust(size, b"\0"), np.uint8)
  every = multihost_utils.process_allgather(padded)
  return [row[:n].tobytes() for row, n in zip(every, lengths, strict=True)]
