"""A run that was stopped for long, and that another one has taken over meanwhile."""

import os
import signal
import subprocess
import sys
import time

from tests.faults import pipeline
from tests.faults.program import ROOT
from vlmrlaif_jax.core.errors import EXIT_USER_ERROR
from vlmrlaif_jax.recipes import runner, workdir_lock

# Runs the toy pipeline with short heartbeats and without flock, as on another host.
# PPO takes long, so that the run is stopped before it writes.
PROGRAM = """
import functools, sys, time
import pytest
from launch import failures
from tests.faults import pipeline
from vlmrlaif_jax.recipes import machine_faults, runner, workdir_lock

def train(run, stage, folder, log):
  if stage == "ppo":
    print("waiting", flush=True)
    for _ in range(300):  # One sleep would also pass while the process is stopped.
      time.sleep(0.01)
  return pipeline.train(run, stage, folder, log)

pipeline.install(pytest.MonkeyPatch(), {**pipeline.PARTS, "ppo": train})
workdir_lock.hold_workdir = functools.partial(
  workdir_lock.hold_workdir, heartbeat_s=0.2, has_flock=False
)
try:
  runner.run_recipe(
    pipeline.config(), sys.argv[1], on_taken=failures.end_taken_run
  )
except workdir_lock.LostLock as error:
  failures.end_taken_run(error)
"""


def list_files(root):
  files = [path for path in root.rglob("*") if path.is_file()]
  return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def start(root):
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, root], cwd=ROOT, text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  while "waiting" not in process.stdout.readline():
    assert process.poll() is None, process.stderr.read()
  process.send_signal(signal.SIGSTOP)
  return process


def test_a_stopped_run_that_was_taken_over_ends_without_writing(tmp_path, monkeypatch):
  process = start(tmp_path / "run")
  pipeline.install(monkeypatch)
  monkeypatch.setattr(workdir_lock, "_identify_kernel", lambda: "another host")
  hold = workdir_lock.hold_workdir
  short = lambda *args, **more: hold(*args, **more, has_flock=False, stale_s=1.0)
  monkeypatch.setattr(workdir_lock, "hold_workdir", short)
  runner.run_recipe(pipeline.config(), str(tmp_path / "run"))
  before = list_files(tmp_path / "run")
  # The lock of a run that still works; after its end there is none.
  with workdir_lock.hold_workdir(tmp_path / "run"):
    lock = (tmp_path / "run" / workdir_lock.LOCK_FILE).read_bytes()
    process.send_signal(signal.SIGCONT)
    started = time.monotonic()
    assert process.wait(30) == EXIT_USER_ERROR
    assert time.monotonic() - started < 2.5  # Before the step ends.
    assert (tmp_path / "run" / workdir_lock.LOCK_FILE).read_bytes() == lock
  assert "has taken over the workdir" in process.stderr.read()
  assert list_files(tmp_path / "run") == before
