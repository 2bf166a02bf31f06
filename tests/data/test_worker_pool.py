"""Workers that answer, fail, fall silent or never start."""

import multiprocessing.connection
import os
import subprocess
import sys
import time

import pytest

from vlmrlaif_jax.data import worker_pool
from vlmrlaif_jax.data.worker_pool import Reply

PROGRAM = """
import sys
from vlmrlaif_jax.data import worker_pool
def answer(request):
  print("noise")
  if request < 0:
    return False, b"negative"
  if request == 99:
    raise KeyError(request)
  return True, b"x" * request
worker_pool.serve(answer)
"""
COMMAND = [sys.executable, "-c", PROGRAM]


def replies(requests, command=COMMAND):
  return sorted(worker_pool.run(command, requests, workers=2, timeout_s=120.0))


def test_run_answers_every_request_whole():
  sizes = [0, 3, 1 << 20, 5]  # A mebibyte comes in several pieces.
  expected = [Reply(i, bytearray(b"x" * size), "") for i, size in enumerate(sizes)]
  assert replies(sizes) == expected


def test_run_hands_on_the_reason():
  assert replies([-1, 1])[0] == Reply(0, None, "negative")


def test_unforeseen_error_ends_the_worker_only(capfd):
  assert [reply.error for reply in replies([99, 1, 2])] == [
    "the process died (exit status 1)",
    "",
    "",
  ]
  assert "KeyError: 99" in capfd.readouterr().err


def test_nothing_to_do_starts_nothing():
  assert replies([], command=["/no/such/program"]) == []


def test_worker_that_cannot_start_is_an_error():
  with pytest.raises(RuntimeError, match=r"could not start: .*exit status 3"):
    replies([1], command=[sys.executable, "-c", "raise SystemExit(3)"])


def test_slow_reader_is_no_reason_to_fail(monkeypatch):
  """The reply lies in the pipe, the first of it, long after its time."""
  started, real_popen, clock = [], subprocess.Popen, time.monotonic

  def popen(*args, **options):
    started.append(real_popen(*args, **options))
    return started[-1]

  monkeypatch.setattr(worker_pool.subprocess, "Popen", popen)
  work = worker_pool.run(COMMAND, [1, 1 << 20], workers=1, timeout_s=120.0)
  first = next(work)
  multiprocessing.connection.wait([started[0].stdout])
  monkeypatch.setattr(worker_pool.time, "monotonic", lambda: clock() + 1000)
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
