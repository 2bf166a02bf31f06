"""A pool of worker processes with a time limit per request.

A video decoder may hang or crash, so it runs in a process that can be killed. A worker
is a fresh interpreter: a fork would break the threads of JAX, and `multiprocessing`
would import the caller's script again. Each worker has its own pipes, so that killing
one harms no other. A request is a line of JSON; a reply is `HEADER`, then its bytes.
docs/adr/006-own-worker-pool.md compares it with pebble.
"""

import json
import os
import queue
import signal
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

HEADER = struct.Struct("<?Q")  # Whether the request succeeded; bytes that follow.
START_LIMIT_S = 300.0  # Seconds to start and import on a busy machine.
START = -1  # The request of a worker that has none yet.
LIFETIME = 500  # Requests per worker; bounds the memory that decoders leak.
ROOT = Path(__file__).parents[2]


class Reply(NamedTuple):
  """The result of one request."""

  request: int  # Position of the request; START if the worker has started.
  payload: bytearray | None  # Bytes of the answer; None if the request failed.
  error: str  # Reason of the failure; "" if there is none.


class _Worker:
  """One process and its current request, which is START while the process starts."""

  def __init__(self, command: Sequence[str], clock: Callable[[], float]):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    stdin, stdout = self.process.stdin, self.process.stdout
    assert stdin is not None and stdout is not None  # Both are pipes.
    self.stdin, self.stdout = stdin, stdout
    self.command, self.clock = command, clock
    self.index = START
    self.asked = 0
    self.received = bytearray()
    self.alive = True
    self.time_limit = START_LIMIT_S
    self.deadline = clock() + START_LIMIT_S

  def fileno(self) -> int:
    """Returns the descriptor that `wait` waits for."""
    return self.stdout.fileno()

  def ask(self, index: int, request: Any, timeout_s: float) -> None:
    """Sends a request; the reply to the last one must have arrived."""
    self.index, self.asked, self.received = index, self.asked + 1, bytearray()
    self.time_limit, self.deadline = timeout_s, self.clock() + timeout_s
    with suppress(BrokenPipeError):  # The process died; `receive` reports it.
      self.stdin.write(json.dumps(request, default=os.fspath).encode() + b"\n")
      self.stdin.flush()

  def receive(self) -> Reply | None:
    """Reads what has arrived, and returns the reply once it is complete."""
    piece = os.read(self.fileno(), 1 << 20)
    if not piece:
      self.wait()
      return self.fail(f"the process died ({_exit_words(self.process.returncode)})")
    self.received += piece
    # The caller may have read late, so arriving bytes extend the time limit.
    self.deadline = self.clock() + self.time_limit
    if len(self.received) < HEADER.size:
      return None
    worked, length = HEADER.unpack_from(self.received)
    if len(self.received) < HEADER.size + length:
      return None
    del self.received[: HEADER.size]
    if worked:
      return Reply(self.index, self.received, "")
    return Reply(self.index, None, self.received.decode())

  def fail(self, reason: str) -> Reply:
    """Kills the process and returns the failure of its request.

    Raises:
      RuntimeError: The process has no request yet, so it could not start.
    """
    self.stop()
    if self.index == START:
      raise RuntimeError(
        f"a worker could not start: {reason}. Its error is printed above. To repeat "
        f"it, run: {' '.join(self.command)}"
      )
    return Reply(self.index, None, reason)

  def wait(self) -> None:
    """Waits for the process to end, unless an unreachable network disk blocks it."""
    with suppress(subprocess.TimeoutExpired):
      self.process.wait(timeout=5.0)

  def stop(self) -> None:
    """Kills the process and closes its pipes."""
    self.alive = False
    self.process.kill()
    self.wait()
    with suppress(BrokenPipeError):
      self.stdin.close()
    self.stdout.close()


def _exit_words(code: int | None) -> str:
  if code is None:
    return "it closed its output and is still running"
  return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def run(
  command: Sequence[str],
  requests: Sequence[Any],
  *,
  workers: int,
  timeout_s: float,
  lifetime: int = LIFETIME,
  clock: Callable[[], float] = time.monotonic,
) -> Iterator[Reply]:
  """Yields the replies to all requests in the order in which they arrive.

  A process that exceeds the time limit or dies is replaced. Only its current request
  fails. A worker waits until its reply is read, so few replies are held in memory.

  Args:
    command: command line of a process that calls `serve`.
    requests: values that JSON can hold; paths become strings.
    workers: processes at the same time.
    timeout_s: seconds for one request, without the start of the process.
    lifetime: requests after which a process is replaced.
    clock: returns the time in seconds.

  Raises:
    RuntimeError: A worker could not start.
  """
  todo = deque(enumerate(requests))
  pool = [_Worker(command, clock) for _ in range(min(workers, len(todo)))]
  try:
    while pool:
      soonest = min(worker.deadline for worker in pool)
      outputs = [worker.fileno() for worker in pool]
      ready = wait(outputs, timeout=max(0.0, soonest - clock()))
      replies = []
      for worker in list(pool):
        if worker.fileno() in ready:
          reply = worker.receive()
        elif worker.deadline <= clock():
          reply = worker.fail(f"no answer within {worker.time_limit:g} s")
        else:
          continue
        if reply is None:
          continue
        if reply.request != START:
          replies.append(reply)
        if todo and worker.alive and worker.asked < lifetime:
          worker.ask(*todo.popleft(), timeout_s)
        else:
          worker.stop()
          pool.remove(worker)
          if todo:
            pool.append(_Worker(command, clock))
      yield from replies
  finally:
    for worker in pool:
      worker.stop()


def serve(answer: Callable[[Any], tuple[bool, bytes]]) -> None:
  """Answers the requests on the standard input until the parent closes it.

  Args:
    answer: returns whether a request succeeded, and the payload, or the reason of the
      failure in UTF-8.
  """
  # A scheduler signals all processes of a job; the parent ends the workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  replies = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # Libraries may print; their output must not mix with the replies.
  requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
  threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
  worked, payload = True, b""  # The first reply reports the start.
  while True:
    replies.write(HEADER.pack(worked, len(payload)) + payload)
    replies.flush()
    worked, payload = answer(requests.get())


def _read_requests(requests: queue.SimpleQueue[Any]) -> None:
  """Queues the requests, and ends the process with its parent even during a request."""
  with open(0, "rb", closefd=False) as lines:  # sys.stdin is locked at exit.
    for line in lines:
      requests.put(json.loads(line))
  os._exit(0)
