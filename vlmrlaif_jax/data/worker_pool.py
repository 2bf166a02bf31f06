"""Processes that answer requests, each within a time limit, or are replaced.

A decoder may hang or crash, so it runs where it can be killed. A worker is a fresh
interpreter and not a fork: the parent has JAX's threads, which a fork would break, and
a script that calls us need not be importable. It speaks over its standard streams:
a request is a line of JSON; a reply is `HEADER`, then its bytes.
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

HEADER = struct.Struct("<?Q")  # Did it work, and how many bytes follow.
START_LIMIT_S = 300.0  # To import what it needs, on a busy machine.
LIFETIME = (
  500  # Requests a worker answers before a new one takes over: leaks end there.
)
ROOT = Path(__file__).parents[2]


class Reply(NamedTuple):
  """What became of a request."""

  index: int  # Of the request.
  payload: bytearray | None  # None when it failed,
  error: str  # for this reason.


class _Worker:
  """One process and the request it is on; None while it starts."""

  def __init__(self, command: Sequence[str]):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    self.index: int | None = None
    self.asked = 0
    self.received = bytearray()
    self.alive = True
    self.time_limit = START_LIMIT_S
    self.deadline = time.monotonic() + START_LIMIT_S

  def fileno(self) -> int:
    """Makes `wait` wait for its replies."""
    return self.process.stdout.fileno()

  def ask(self, index: int, request: Any, timeout_s: float) -> None:
    """Sends a request; to be called when no reply is due."""
    self.index, self.asked, self.received = index, self.asked + 1, bytearray()
    self.time_limit, self.deadline = timeout_s, time.monotonic() + timeout_s
    with suppress(BrokenPipeError):  # It died; `receive` will see that.
      self.process.stdin.write(json.dumps(request, default=os.fspath).encode() + b"\n")
      self.process.stdin.flush()

  def receive(self) -> Reply | None:
    """The reply, once all of it is there."""
    piece = os.read(self.fileno(), 1 << 20)
    if not piece:
      self.wait()
      return self.fail(f"the process died ({_exit_words(self.process.returncode)})")
    self.received += piece
    # Bytes are proof of life, however long the caller took to come and read them.
    self.deadline = time.monotonic() + self.time_limit
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
    """Ends the process; what it was on has failed."""
    self.stop()
    if self.index is None:
      raise RuntimeError(
        f"a worker could not start: {reason}; its own error stands above. "
        f"Try its command by hand: {' '.join(self.process.args)}"
      )
    return Reply(self.index, None, reason)

  def wait(self) -> None:
    """Waits for its end, but not for one that a dead network disk holds back."""
    with suppress(subprocess.TimeoutExpired):
      self.process.wait(timeout=5.0)

  def stop(self) -> None:
    """Kills the process, whatever it is on."""
    self.alive = False
    self.process.kill()
    self.wait()
    with suppress(BrokenPipeError):
      self.process.stdin.close()
    self.process.stdout.close()


def _exit_words(code: int | None) -> str:
  if code is None:
    return "it closed its output and runs on"
  return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def run(
  command: Sequence[str], requests: Sequence[Any], *, workers: int, timeout_s: float
) -> Iterator[Reply]:
  """Replies to all requests, in the order in which they come.

  A process that takes longer than `timeout_s` for one request, or dies on it, is
  replaced: that request fails and no other.

  Args:
    command: starts a process that calls `serve`.
    requests: anything JSON can hold.
    timeout_s: seconds for one request, the start of a process not counted.
  """
  todo = deque(enumerate(requests))
  pool = [_Worker(command) for _ in range(min(workers, len(todo)))]
  try:
    while pool:
      soonest = min(worker.deadline for worker in pool)
      ready = wait(pool, timeout=max(0.0, soonest - time.monotonic()))
      replies = []
      for worker in list(pool):
        if worker in ready:
          reply = worker.receive()
        elif worker.deadline <= time.monotonic():
          reply = worker.fail(f"no answer within {worker.time_limit:g} s")
        else:
          continue
        if reply is None:
          continue
        if reply.index is not None:  # Else it says that it has started.
          replies.append(reply)
        if todo and worker.alive and worker.asked < LIFETIME:
          worker.ask(*todo.popleft(), timeout_s)
        else:
          worker.stop()
          pool.remove(worker)
          if todo:
            pool.append(_Worker(command))
      yield from replies
  finally:
    for worker in pool:
      worker.stop()


def serve(answer: Callable[[Any], tuple[bool, bytes]]) -> None:
  """What a worker does: answers the requests on its standard input, until it ends.

  Args:
    answer: request -> whether it worked, and the payload or the reason in UTF-8.
  """
  # The parent ends us. A scheduler may signal all processes of a job.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  replies = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # What a library prints must not stand among the replies.
  requests = queue.SimpleQueue()
  threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
  worked, payload = True, b""  # The first says that we have started.
  while True:
    replies.write(HEADER.pack(worked, len(payload)) + payload)
    replies.flush()
    worked, payload = answer(requests.get())


def _read_requests(requests: queue.SimpleQueue) -> None:
  """Ends the process with its parent, even while an answer hangs."""
  with open(0, "rb", closefd=False) as lines:  # sys.stdin would be locked at exit.
    for line in lines:
      requests.put(json.loads(line))
  os._exit(0)
