"""Helpers for programs that run as several processes, usually one per host.

Every process runs the same stages in the same order and takes the same decisions. Each
process reads, decodes and stacks only its own rows of a batch (`local_rows`). Results
of a batch, such as tokens and scores, are fetched by all processes (`fetch_arrays`).
Results that depend on a disk or a server are computed once and sent to all processes
(`on_process_zero`, `map_across_processes`). Process 0 writes. All processes share the
file system of the workdir.

`fetch_arrays`, `allgather_json`, `on_process_zero`, `map_across_processes`,
`any_process` and `check_same_config` are collective: every process must call them, in
the same order and from the main thread. A function that is passed to one of them runs
in a single process. A collective call inside it raises, even in a run of one process.
"""

import ipaddress
import json
import os
import re
import socket
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
from vlmrlaif_jax.core.errors import UserError, make_printable

# Error messages that collectives and checkpoint barriers produce when a peer process
# dies. The type of the error varies.
LOST_PEER = re.compile(
  r"Gloo \S+ failed|NCCL|(closed|reset) by peer|Socket closed|heartbeat timeout"
)
DEAD_PEER = "heartbeat timeout"  # The message of JAX itself about a dead peer.
# Smallest message in bytes. Each length is compiled once, so lengths are powers of 2.
MIN_MESSAGE_BYTES = 1024
_IS_ALONE = ContextVar("alone", default=False)  # True while one process runs `make`.


class HostError(UserError):
  """A failure in another process, or of the connection between the processes."""


def connect_processes(
  coordinator: str | None,
  processes: int | None,
  process: int | None,
  *,
  heartbeat_s: int,
  start_s: int,
) -> None:
  """Connects this process to the others. Must run before JAX opens a device.

  On TPU pods, under Slurm and under Open MPI, JAX detects arguments that are None.

  Args:
    coordinator: HOST:PORT at which process 0 listens.
    processes: Number of processes.
    process: Index of this process, from 0.
    heartbeat_s: Seconds of silence after which a process counts as dead. JAX then
      aborts the others from C++, with a message on stderr.
    start_s: Seconds within which all processes must connect.

  Raises:
    HostError: The processes cannot connect, or an argument is missing.
  """
  place = coordinator, processes, process
  # The service would replace Python's handler of SIGTERM; see `any_process`.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      *place,
      coordinator_bind_address=find_bind_address(coordinator),
      # Slurm's detection would give each process one device of its host only.
      cluster_detection_method=None if None in place else "deactivate",
      initialization_timeout=start_s,
      heartbeat_timeout_seconds=heartbeat_s,
      shutdown_timeout_seconds=heartbeat_s,
    )
  except (RuntimeError, ValueError) as error:
    raise HostError(
      f"the processes cannot connect: {error}\nStart each process with the same "
      "--processes, its own --process, and --coordinator=HOST:PORT of process 0"
    ) from error


def is_loopback(host: str) -> bool:
  """Returns whether only this machine reaches an address or a host's name.

  >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("10.0.0.1")
  (True, True, False)
  """
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def find_bind_address(coordinator: str | None) -> str | None:
  """Returns the one address at which process 0 listens, or None for all of its host.

  A peer needs no password, so the port should be open in the given network only. The
  address is None if it is not an address of this host, or if the host's name leads to
  its loopback address, as on Debian, where peers could not reach it.

  >>> find_bind_address("localhost:1234")
  '127.0.0.1:1234'

  Args:
    coordinator: HOST:PORT at which process 0 listens; None is detected by JAX.
  """
  host, _, port = (coordinator or "").rpartition(":")
  try:
    address = socket.gethostbyname(host)
    with socket.socket() as probe:
      probe.bind((address, 0))
  except OSError:
    return None
  is_hidden = is_loopback(address) and host not in (address, "localhost")
  return None if is_hidden or not host else f"{address}:{port}"


def is_process_zero() -> bool:
  """Returns whether this is the process that writes."""
  return jax.process_index() == 0


def process_index() -> int:
  """Returns the index of this process, from 0."""
  return jax.process_index()


def is_multiprocess() -> bool:
  """Returns whether there is more than one process."""
  return jax.process_count() > 1


def print_once(line: str) -> None:
  """Prints a line in process 0 only."""
  if is_process_zero():
    print(make_printable(line), flush=True)


def fetch_arrays(tree: PyTree) -> PyTree:
  """Returns whole arrays in NumPy, wherever their shards are."""

  def gather(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return x
    _check_collective("fetch_arrays")
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.device_get(jax.tree.map(gather, tree))


def local_rows(count: int, mesh: Mesh) -> Int[np.ndarray, " rows"]:
  """Returns the indices of this process's rows of a batch; see sharding.shard_batch.

  Args:
    count: Rows of the whole batch.
    mesh: Mesh of all processes.
  """
  if not is_multiprocess():
    return np.arange(count)
  return sharding.process_row_indices(mesh, jax.process_index(), count)


def allgather_json(make: Callable[[], Any]) -> list[Any]:
  """Calls a function in each process and returns all results, in order of process.

  Args:
    make: Returns a value that JSON can represent.

  Raises:
    HostError: `make` failed in another process. That process raises its own error.
    RuntimeError: The call is inside the `make` of another collective call.
  """
  _check_collective("allgather_json")
  if not is_multiprocess():
    return [_call_alone(make)]
  failure = None
  try:
    own = {"result": _call_alone(make)}
  except Exception as error:
    failure, own = error, {"error": f"{type(error).__name__}: {error}"}
  # Messages arrive in the order of the devices, which may not be that of processes.
  own["process"] = process_index()
  messages = [json.loads(text) for text in _exchange(json.dumps(own).encode())]
  messages.sort(key=lambda message: message["process"])
  if failure is not None:
    raise failure
  for message in messages:
    if "error" in message:
      raise HostError(
        f"process {message['process']} of {len(messages)} failed: {message['error']}"
      )
  return [message["result"] for message in messages]


def _call_alone(make: Callable[[], Any]) -> Any:
  token = _IS_ALONE.set(True)
  try:
    return make()
  finally:
    _IS_ALONE.reset(token)


def _check_collective(name: str) -> None:
  """Raises if only this process makes a collective call, which would never return."""
  if _IS_ALONE.get():
    raise RuntimeError(
      f"distributed.{name} waits for every process, but only some processes run the "
      "function that calls it: call it before on_process_zero, allgather_json or "
      "map_across_processes, and use its result in the function"
    )


def on_process_zero(make: Callable[[], Any]) -> Any:
  """Calls a function in process 0 and returns its result in all processes."""
  return allgather_json(make if is_process_zero() else lambda: None)[0]


def local_items(items: Sequence[Any]) -> Sequence[Any]:
  """Returns this process's share of the items, dealt round-robin."""
  return items[jax.process_index() :: jax.process_count()]


def map_across_processes(
  make: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]
) -> list:
  """Divides items among the processes and returns all results, in order of the items.

  Args:
    make: Returns one result for each item; JSON can represent it.
    items: The same items in every process.
  """
  parts = allgather_json(lambda: list(make(local_items(items))))
  count = len(parts)
  return [parts[i % count][i // count] for i in range(len(items))]


def any_process(flag: bool) -> bool:
  """Returns whether the flag is True in any process."""
  _check_collective("any_process")
  if not is_multiprocess():
    return flag
  return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def check_same_config(config: str) -> None:
  """Checks that all processes have the same config.

  Raises:
    HostError: The configs differ. Every process raises.
  """
  every = allgather_json(lambda: config)
  others = [number for number, other in enumerate(every) if other != every[0]]
  if others:
    raise HostError(
      f"the config of processes {others} differs from that of process 0: start all "
      "with the same command, except for --process"
    )


def abort_process(
  error: Exception, *, code: int, heartbeat_s: int, note: Callable[[], None]
) -> NoReturn:
  """Aborts this process after an error, so that its peers notice.

  A normal exit would wait for the peers, which wait for this process. If the error may
  come from a dead peer, the function first gives JAX time to report that.

  Args:
    error: The error that ends the process.
    code: Exit code.
    heartbeat_s: The value passed to `connect_processes`.
    note: Called when the error is this process's own, not that of a dead peer.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if LOST_PEER.search(str(error)):
    # If a peer has died, JAX aborts this process soon and names the peer.
    time.sleep(1.5 * heartbeat_s + 5)
    if DEAD_PEER in str(error):
      os.abort()  # JAX ends a process in the same way.
    print(
      "error: no process has died, so the error above is likely to repeat: check the "
      "network between the hosts and the settings of NCCL or Gloo",
      file=sys.stderr,
      flush=True,
    )
  note()
  if is_process_zero():
    # Peers with the same error need time to print it. They end with process 0.
    time.sleep(2)
  os._exit(code)


def _exchange(own: bytes) -> list[bytes]:
  """Returns the messages of all processes, in the order of their devices."""
  lengths = multihost_utils.process_allgather(np.int32(len(own)))
  size = max(MIN_MESSAGE_BYTES, 1 << (int(lengths.max()) - 1).bit_length())
  padded = np.frombuffer(own.ljust(size, b"\0"), np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]
