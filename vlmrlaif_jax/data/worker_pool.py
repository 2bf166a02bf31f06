"""Worker processes with a time limit per request.

`run_workers` sends requests to processes that call `serve_requests`. `SerialWorker` is
one process for requests that are not known in advance. A video decoder
may hang or crash, so it runs in a process that can be killed. A worker is a new
interpreter: a fork would break the threads of JAX, and `multiprocessing` would import
the caller's script again. Each worker has its own connection, so that killing one does
not affect the others. docs/adr/006-own-worker-pool.md compares it with pebble.
"""

import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300.0  # Seconds to start and import on a busy machine.
START = -1  # Request index of a worker that is starting.
LIFETIME = 500  # Requests per worker, which bounds the memory that decoders leak.
MAX_MEMORY = 6 << 30  # Bytes of address space of a worker.
MAX_CPU_S = 3600  # Processor time of one request of a worker whose parent died.
# Variables of the parent that a worker receives. Others may contain secrets.
ENVIRONMENT = (
  *("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH"),
  *("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS"),
)
# Each thread of a numerical library would reserve address space.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ROOT = Path(__file__).parents[2]


class _Worker:
  """One process and its current request, which is START while the process starts."""

  def __init__(self, command: Sequence[str]):
    self.connection, child_end = Pipe()
    with child_end:
      self.process = subprocess.Popen(
        [*command, str(child_end.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=2,  # Prints of libraries must not mix with the caller's stdout.
        pass_fds=[child_end.fileno()],
        env=_make_environment(),
      )
    self.command = command
    self.index = START
    self.num_requests = 0
    self.time_limit = START_TIMEOUT_S
    self.deadline = time.monotonic() + START_TIMEOUT_S

  def send(self, index: int, request: Any, timeout_s: float) -> None:
    """Sends a request; the answer to the previous one must have arrived."""
    self.index, self.num_requests = index, self.num_requests + 1
    self.time_limit, self.deadline = timeout_s, time.monotonic() + timeout_s
    with suppress(OSError):  # The process died; `receive` reports it.
      self.connection.send(request)

  def receive(self) -> Any:
    """Returns the answer that starts to arrive, or the reason why there is none."""
    try:
      return self.connection.recv()
    except (EOFError, OSError):
      self.wait()
      return self.fail(f"the process died ({_format_exit(self.process.returncode)})")

  def await_answer(self) -> Any:
    """Returns the answer, or the reason why there is none by the deadline."""
    if self.connection.poll(max(0.0, self.deadline - time.monotonic())):
      return self.receive()
    return self.fail(f"no answer within {self.time_limit:g} s")

  def is_usable(self, lifetime: int) -> bool:
    """Returns whether the process can receive another request."""
    is_running = not self.connection.closed and self.process.poll() is None
    return is_running and self.num_requests < lifetime

  def fail(self, reason: str) -> str:
    """Kills the process and returns the reason, the answer to its request.

    Raises:
      RuntimeError: The process has no request yet, so it could not start.
    """
    self.stop()
    if self.index == START:
      raise RuntimeError(
        f"a worker could not start: {reason}. Its error is printed above. To reproduce "
        f"it, run: {' '.join(self.command)}"
      )
    return reason

  def wait(self) -> None:
    """Waits for the process to end, unless an unreachable network disk blocks it."""
    with suppress(subprocess.TimeoutExpired):
      self.process.wait(timeout=5.0)

  def stop(self) -> None:
    """Kills the process and closes the connection."""
    self.process.kill()
    self.wait()
    self.connection.close()


def _make_environment() -> dict[str, str]:
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  passed = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
  return passed | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _format_exit(code: int | None) -> str:
  if code is None:
    return "it closed its connection and is still running"
  return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def run_workers(
  command: Sequence[str],
  requests: Sequence[Any],
  *,
  workers: int,
  timeout_s: float,
  lifetime: int = LIFETIME,
) -> Iterator[Any]:
  """Yields the answer to each request in order, or the reason why there is none.

  A process that exceeds the time limit or dies is replaced. A request during which one
  died is sent to a second one: a program that needs memory may have ended the first.
  A worker waits until its answer is read, which bounds the memory of answers.

  Args:
    command: Command line of a process that calls `serve_requests`.
    requests: Values that can be pickled.
    workers: Largest number of concurrent processes.
    timeout_s: Seconds for one request, without the start of the process.
    lifetime: Requests after which a process is replaced.

  Raises:
    RuntimeError: A worker could not start.
  """
  todo = deque(enumerate(requests))
  pool = [_Worker(command) for _ in range(min(workers, len(todo)))]
  early: dict[int, Any] = {}  # Answers arrive in any order.
  final: set[int] = set()  # Requests that are not sent again.
  due = 0
  try:
    while pool:
      soonest = min(worker.deadline for worker in pool)
      connections = [worker.connection for worker in pool]
      ready = wait(connections, timeout=max(0.0, soonest - time.monotonic()))
      for worker in list(pool):
        if worker.connection in ready:
          answer = worker.receive()
        elif worker.deadline <= time.monotonic():
          answer = worker.await_answer()
          final.add(worker.index)
        else:
          continue
        if worker.connection.closed and worker.index not in final:
          final.add(worker.index)
          todo.appendleft((worker.index, requests[worker.index]))
        elif worker.index != START:
          early[worker.index] = answer
        if todo and not worker.connection.closed and worker.num_requests < lifetime:
          worker.send(*todo.popleft(), timeout_s)
        else:
          worker.stop()
          pool.remove(worker)
          if todo:
            pool.append(_Worker(command))
      while due in early:
        yield early.pop(due)
        due += 1
  finally:
    for worker in pool:
      worker.stop()


class SerialWorker:
  """A process that answers one request at a time, for callers in several threads.

  It starts with the first request, and ends with this process. It is replaced if it
  exceeds a time limit or dies, and after `lifetime` requests.

  Args:
    command: Command line of a process that calls `serve_requests`.
    lifetime: Requests after which the process is replaced.
  """

  def __init__(self, command: Sequence[str], *, lifetime: int = LIFETIME):
    self._command, self._lifetime = command, lifetime
    self._lock = threading.Lock()
    self._worker: _Worker | None = None

  def ask(self, request: Any, timeout_s: float) -> Any:
    """Returns the answer to a request, or the reason why there is none.

    Args:
      request: Value that can be pickled.
      timeout_s: Seconds for the request, without the start of the process.

    Raises:
      RuntimeError: The process could not start.
    """
    with self._lock:
      worker = self._worker
      if worker is None or not worker.is_usable(self._lifetime):
        if worker is not None:
          worker.stop()
        worker = self._worker = _Worker(self._command)
      try:
        if worker.index == START:
          worker.await_answer()
        worker.send(0, request, timeout_s)
        return worker.await_answer()
      except BaseException:  # The next request must not receive this answer.
        worker.stop()
        raise


def serve_requests(answer: Callable[[Any], Any]) -> None:
  """Answers the requests of the parent until it closes its end of the connection.

  The last argument of the program is the file descriptor of the connection.

  Args:
    answer: Returns the answer to a request; the answer can be pickled.
  """
  # A scheduler signals all processes of a job, but the parent ends the workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  limit_process()
  parent = Connection(int(sys.argv[-1]))
  requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
  reader = threading.Thread(target=_read_requests, args=(parent, requests), daemon=True)
  reader.start()
  parent.send(None)  # Reports that the worker has started.
  while True:
    request = requests.get()
    _limit_cpu_time()
    parent.send(answer(request))


def limit_process() -> None:
  """Limits the memory of this process, and disables core dumps."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  limit = MAX_MEMORY if hard == resource.RLIM_INFINITY else min(MAX_MEMORY, hard)
  with suppress(ValueError, OSError):  # macOS does not have this limit.
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _limit_cpu_time() -> None:
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  limit = int(time.process_time()) + MAX_CPU_S
  if hard == resource.RLIM_INFINITY or limit < hard:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _read_requests(parent: Connection, requests: queue.SimpleQueue[Any]) -> None:
  """Queues the requests; ends this process with its parent, even during a request."""
  with suppress(EOFError, OSError):
    while True:
      requests.put(parent.recv())
  os._exit(0)
