"""Workers that answer, fail, hang, crash or never start."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vlmrlaif_jax.data import worker_pool
from vlmrlaif_jax.data.worker_pool import Reply

PROGRAM = """
import os, pathlib, sys
from vlmrlaif_jax.data import worker_pool
def answer(request):
  print("noise")
  if request == "pid":
    return True, str(os.getpid()).encode()
  if isinstance(request, str):
    pathlib.Path(request).touch()
    return True, b"x" * (1 << 20)
  if request < 0:
    return False, b"negative"
  if request == 99:
    raise KeyError(request)
  return True, b"x" * request
worker_pool.serve(answer)
"""
COMMAND = [sys.executable, "-c", PROGRAM]

# Answers 1, but dies of the signal of any other request in the middle of its reply.
TORN = """
import os, sys
from vlmrlaif_jax.data.worker_pool import HEADER
write = lambda data: (sys.stdout.buffer.write(data), sys.stdout.buffer.flush())
write(HEADER.pack(True, 0))
for line in sys.stdin:
  write(HEADER.pack(True, 100) + b"x" * 50)
  if int(line) > 1:
    os.kill(os.getpid(), int(line))
  write(b"x" * 50)
"""


def replies(requests, command=COMMAND, workers=2, **settings):
  work = worker_pool.run(
    command, requests, workers=workers, timeout_s=120.0, **settings
  )
  return sorted(work)


def test_run_answers_every_request_whole():
  sizes = [0, 3, 1 << 20, 5]  # A mebibyte comes in several pieces.
  expected = [Reply(i, bytearray(b"x" * size), "") for i, size in enumerate(sizes)]
  assert replies(sizes) == expected


def test_run_returns_the_reason_of_a_failure():
  assert replies([-1, 1])[0] == Reply(0, None, "negative")


def test_unforeseen_error_ends_the_worker_only(capfd):
  failed, *others = replies([99, 1, 2])
  assert failed.payload is None and "exit status 1" in failed.error
  assert [reply.error for reply in others] == ["", ""]
  assert "KeyError: 99" in capfd.readouterr().err


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGSEGV])
def test_worker_that_dies_in_the_middle_of_a_reply_fails_that_request_alone(fatal):
  requests = [1, int(fatal), 1, 1]
  first, failed, *others = replies(requests, [sys.executable, "-c", TORN])
  assert failed.payload is None and fatal.name in failed.error
  assert [len(reply.payload) for reply in [first, *others]] == [100] * 3


def test_nothing_to_do_starts_nothing():
  assert replies([], command=["/no/such/program"]) == []


def test_worker_that_cannot_start_is_an_error():
  with pytest.raises(RuntimeError, match="exit status 3"):
    replies([1], command=[sys.executable, "-c", "raise SystemExit(3)"])


def test_worker_is_replaced_after_its_lifetime_and_ends_with_the_work():
  made = replies(["pid"] * 5, workers=1, lifetime=2)
  pids = [int(reply.payload) for reply in made]
  assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


def test_time_in_which_nobody_reads_does_not_count(tmp_path):
  now, answered = 0.0, tmp_path / "answered"
  work = worker_pool.run(
    COMMAND, [1, str(answered)], workers=1, timeout_s=120.0, clock=lambda: now
  )
  first = next(work)
  while not answered.exists():
    time.sleep(0.01)
  time.sleep(3.0)  # Now the first bytes of the second reply are in the pipe.
  now = 1000.0
  assert [reply.error for reply in [first, *work]] == ["", ""]


def test_worker_ends_with_its_parent(tmp_path):
  """Even while it hangs: opening a pipe that nobody writes to."""
  os.mkfifo(tmp_path / "fifo")
  program = PROGRAM.replace('print("noise")', f"open({str(tmp_path / 'fifo')!r})")
  environment = os.environ | {"PYTHONPATH": str(worker_pool.ROOT)}
  worker = subprocess.Popen(
    [sys.executable, "-c", program],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    env=environment,
  )
  worker.stdin.write(b"1\n")
  worker.stdin.close()
  assert worker.wait(timeout=120) == 0
