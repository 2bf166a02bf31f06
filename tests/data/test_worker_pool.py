"""Workers that answer, fail, hang, crash or never start."""

import os
import signal
import subprocess
import sys
import time
import types
from multiprocessing.connection import Pipe

import pytest

from vlmrlaif_jax.data import worker_pool

PROGRAM = """
import os, pathlib, sys, time
from vlmrlaif_jax.data import worker_pool
def answer(request):
  print("noise")
  if request == "pid":
    return os.getpid()
  if request == "hang":
    time.sleep(600)
  if isinstance(request, str):
    pathlib.Path(request).touch()
    return b"x" * (1 << 20)
  if request == 99:
    raise KeyError(request)
  return b"x" * request
worker_pool.serve_requests(answer)
"""
COMMAND = [sys.executable, "-c", PROGRAM]

# Answers 1, but dies of the signal of any other request in the middle of its reply.
TORN = """
import os, struct, sys
from multiprocessing.connection import Connection
parent = Connection(int(sys.argv[-1]))
parent.send(None)
while True:
  request = parent.recv()
  if request > 1:
    os.write(parent.fileno(), struct.pack("!i", 100) + b"x" * 50)
    os.kill(os.getpid(), request)
  parent.send(b"x" * 100)
"""


def answers(requests, command=COMMAND, workers=2, **settings):
  work = worker_pool.run_workers(
    command, requests, workers=workers, timeout_s=120.0, **settings
  )
  return list(work)


def test_run_answers_every_request_whole_and_in_turn():
  sizes = [0, 3, 1 << 20, 5]  # A mebibyte comes in several pieces.
  assert answers(sizes) == [b"x" * size for size in sizes]


def test_unforeseen_error_ends_the_worker_only(capfd):
  failed, *others = answers([99, 1, 2])
  assert "exit status 1" in failed and others == [b"x", b"xx"]
  printed = capfd.readouterr()
  assert "KeyError: 99" in printed.err and printed.out == ""


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGSEGV])
def test_worker_that_dies_in_the_middle_of_a_reply_fails_that_request_alone(fatal):
  requests = [1, int(fatal), 1, 1]
  first, failed, *others = answers(requests, [sys.executable, "-c", TORN])
  assert fatal.name in failed
  assert [first, *others] == [b"x" * 100] * 3


# Kills itself, or stops itself, at its first request, but not once the file is there.
ONCE = """
import os, pathlib, sys
from vlmrlaif_jax.data import worker_pool
def answer(request):
  number, path = request
  if number and not pathlib.Path(path).exists():
    pathlib.Path(path).touch()
    os.kill(os.getpid(), number)
  return b"x"
worker_pool.serve_requests(answer)
"""


def test_the_request_of_a_killed_worker_is_answered_by_another_one(tmp_path):
  requests = [(0, ""), (signal.SIGKILL, str(tmp_path / "died")), (0, ""), (0, "")]
  assert answers(requests, [sys.executable, "-c", ONCE]) == [b"x"] * 4
  assert (tmp_path / "died").exists()


def test_a_stopped_worker_ends_at_its_deadline_and_the_others_answer(tmp_path):
  requests = [(0, ""), (signal.SIGSTOP, str(tmp_path / "stopped")), (0, ""), (0, "")]
  command = [sys.executable, "-c", ONCE]
  work = worker_pool.run_workers(command, requests, workers=2, timeout_s=4.0)
  first, stopped, *others = work
  assert "no answer within 4 s" in stopped and [first, *others] == [b"x"] * 3


LIMITED = """
import os, resource
from vlmrlaif_jax.data import worker_pool
names = "RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU"
limits = lambda: [resource.getrlimit(getattr(resource, name))[0] for name in names]
worker_pool.serve_requests(lambda request: [sorted(os.environ), *limits()])
"""


def test_worker_has_no_secrets_and_limits(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", "secret")
  [[names, memory, core, cpu]] = answers([1], [sys.executable, "-c", LIMITED])
  assert "OPENAI_API_KEY" not in names and "PATH" in names
  assert (memory, core) == (worker_pool.MAX_MEMORY, 0)
  assert worker_pool.MAX_CPU_S <= cpu < worker_pool.MAX_CPU_S + 60


def test_nothing_to_do_starts_nothing():
  assert answers([], command=["/no/such/program"]) == []


def test_worker_that_cannot_start_is_an_error():
  with pytest.raises(RuntimeError, match="exit status 3"):
    answers([1], command=[sys.executable, "-c", "raise SystemExit(3)"])


def test_worker_is_replaced_after_its_lifetime_and_ends_with_the_work():
  pids = answers(["pid"] * 5, workers=1, lifetime=2)
  assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


def test_time_in_which_nobody_reads_does_not_count(tmp_path, monkeypatch):
  now, answered = 0.0, tmp_path / "answered"
  clock = types.SimpleNamespace(monotonic=lambda: now)
  monkeypatch.setattr(worker_pool, "time", clock)
  requests = [1, str(answered)]
  work = worker_pool.run_workers(COMMAND, requests, workers=1, timeout_s=120.0)
  first = next(work)
  while not answered.exists():
    time.sleep(0.01)
  time.sleep(3.0)  # Now the first bytes of the second answer are there.
  now = 1000.0
  assert [first, *work] == [b"x", b"x" * (1 << 20)]


def test_worker_ends_with_its_parent(tmp_path):
  """Even while it hangs: opening a pipe that nobody writes to."""
  os.mkfifo(tmp_path / "fifo")
  program = PROGRAM.replace('print("noise")', f"open({str(tmp_path / 'fifo')!r})")
  ours, theirs = Pipe()
  with ours, theirs:
    worker = subprocess.Popen(
      [sys.executable, "-c", program, str(theirs.fileno())],
      pass_fds=[theirs.fileno()],
      env=os.environ | {"PYTHONPATH": str(worker_pool.ROOT)},
    )
    assert ours.recv() is None  # It has started.
    ours.send(1)
  assert worker.wait(timeout=120) == 0


def test_serial_worker_stays_until_it_hangs_or_dies_or_is_old():
  worker = worker_pool.SerialWorker(COMMAND, lifetime=4)
  first = worker.ask("pid", 120.0)
  assert (worker.ask(3, 120.0), worker.ask("pid", 120.0)) == (b"xxx", first)
  assert worker.ask("hang", 0.2) == "no answer within 0.2 s"
  second = worker.ask("pid", 120.0)
  assert second != first
  os.kill(second, signal.SIGKILL)
  worker._worker.process.wait()
  pids = [worker.ask("pid", 120.0) for _ in range(5)]
  assert len({second, *pids[:4]}) == 2 and pids[4] not in pids[:4]
  for pid in (first, second, pids[0]):
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


def test_serial_worker_that_cannot_start_is_an_error_each_time():
  worker = worker_pool.SerialWorker([sys.executable, "-c", "raise SystemExit(3)"])
  for _ in range(2):
    with pytest.raises(RuntimeError, match="exit status 3"):
      worker.ask(1, 120.0)


def test_interrupted_caller_leaves_no_answer_behind(monkeypatch):
  worker = worker_pool.SerialWorker(COMMAND)
  assert worker.ask(1, 120.0) == b"x"
  with monkeypatch.context() as patch:
    patch.setattr(worker_pool._Worker, "await_answer", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      worker.ask(2, 120.0)
  assert worker.ask(3, 120.0) == b"xxx"
