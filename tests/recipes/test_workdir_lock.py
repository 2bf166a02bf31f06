"""One run writes in a workdir; the lock of a dead run is taken over."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.recipes import process_errors, runner, validation, workdir_lock

HOLD = """
import pathlib, sys, time
from vlmrlaif_jax.recipes import workdir_lock
from vlmrlaif_jax.core.errors import UserError
try:
  with workdir_lock.hold_workdir(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
except UserError as error:
  print(error, flush=True)
"""


def start(workdir):
  """A process that holds the workdir until its stdin gets a line."""
  return subprocess.Popen(
    [sys.executable, "-c", HOLD, workdir],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip


@contextlib.contextmanager
def running(workdir):
  process = start(workdir)
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def leave_lock(workdir, **changes):
  """Writes the lock of a run of another host."""
  now = time.time()
  holder = workdir_lock.Holder("elsewhere", 1, "its kernel", "abc", now, now)
  holder = holder._replace(**changes)
  (workdir / workdir_lock.LOCK_FILE).write_text(json.dumps(holder._asdict()))


def hold(workdir, notes=None, **settings):
  note = (lambda line: None) if notes is None else notes.append
  return workdir_lock.hold_workdir(workdir, note, **settings)


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
  with running(tmp_path) as first, running(tmp_path) as second:
    lines = {first.stdout.readline(), second.stdout.readline()}
    assert "held\n" in lines
    refusal = (lines - {"held\n"}).pop()
    assert str(tmp_path) in refusal and "--workdir" in refusal
    pid = first.pid if f"process {first.pid} on " in refusal else second.pid
    assert f"process {pid} on {os.uname().nodename}, since 20" in refusal


def test_kill_9_frees_the_workdir(tmp_path):
  notes = []
  with running(tmp_path) as process:
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with hold(tmp_path, notes):
      pass
    assert [f"process {process.pid}" in line for line in notes] == [True]


@pytest.mark.parametrize("has_flock", [True, False])
def test_nothing_stays_after_a_normal_end(tmp_path, has_flock):
  with hold(tmp_path, has_flock=has_flock) as check:
    check()
    assert (tmp_path / workdir_lock.LOCK_FILE).exists()
  assert not (tmp_path / workdir_lock.LOCK_FILE).exists()


def test_a_stale_heartbeat_of_another_host_is_taken_over(tmp_path):
  notes = []
  leave_lock(tmp_path, heartbeat=time.time() - workdir_lock.ABANDONED_S - 1)
  with hold(tmp_path, notes):
    assert workdir_lock.read_holder(tmp_path / "run.lock").pid == os.getpid()
  assert len(notes) == 1 and "elsewhere" in notes[0] and "takes over" in notes[0]


def test_a_host_that_gives_no_more_signs_is_waited_for_and_taken_over(tmp_path):
  notes = []
  leave_lock(tmp_path)
  with hold(tmp_path, notes, stale_s=0.5):
    pass
  assert "waiting up to" in notes[0] and "takes over" in notes[1]


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_heartbeat_of_another_host_that_is_renewed_is_refused(tmp_path, has_flock):
  notes = []

  def renew(line):
    notes.append(line)
    leave_lock(tmp_path, heartbeat=time.time() + 1)

  leave_lock(tmp_path)
  with pytest.raises(UserError, match="process 1 on elsewhere"):
    with workdir_lock.hold_workdir(tmp_path, renew, stale_s=60, has_flock=has_flock):
      pass
  assert len(notes) == 1
  assert workdir_lock.read_holder(tmp_path / "run.lock").host == "elsewhere"


def test_without_flock_a_living_process_is_refused_and_a_dead_one_is_not(tmp_path):
  with hold(tmp_path, has_flock=False, heartbeat_s=0.1):
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
      with hold(tmp_path, has_flock=False, stale_s=60):
        pass
  dead = subprocess.Popen([sys.executable, "-c", ""])
  dead.wait()
  leave_lock(tmp_path, pid=dead.pid, kernel=workdir_lock._identify_kernel())
  with hold(tmp_path, has_flock=False):
    pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_damaged_lock_of_no_living_process_is_taken_over(tmp_path, content):
  (tmp_path / workdir_lock.LOCK_FILE).write_text(content)
  with hold(tmp_path):
    pass


def test_the_holder_sees_that_it_lost_the_workdir(tmp_path):
  with hold(tmp_path) as check:
    leave_lock(tmp_path)
    with pytest.raises(workdir_lock.LostLock, match="elsewhere has taken over"):
      check()
  assert workdir_lock.read_holder(tmp_path / "run.lock").host == "elsewhere"
  with hold(tmp_path / "new") as check:
    (tmp_path / "new" / "run.lock").unlink()
    with pytest.raises(workdir_lock.LostLock, match="was removed during the run"):
      check()


def test_a_heartbeat_is_renewed_and_does_not_restore_a_removed_folder(tmp_path):
  with hold(tmp_path / "run", heartbeat_s=0.02):
    before = workdir_lock.read_holder(tmp_path / "run" / "run.lock").heartbeat
    limit = time.monotonic() + 20
    while workdir_lock.read_holder(tmp_path / "run" / "run.lock").heartbeat == before:
      assert time.monotonic() < limit
      time.sleep(0.02)
    (tmp_path / "run" / "run.lock").unlink()
    (tmp_path / "run").rmdir()
    time.sleep(0.1)
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_the_config_and_notes_of_errors_as_they_are(tmp_path):
  made = lambda kl_coef: small.config({"data.prompt_len": 64}, ppo__kl_coef=kl_coef)
  runner.check_workdir(made(0.25), tmp_path)
  process_errors.note_error(tmp_path, 0, ValueError("a cat"))
  files = lambda: {path.name: path.read_bytes() for path in tmp_path.glob("*.[jt]*")}
  before = files()
  with running(tmp_path) as process:
    assert process.stdout.readline() == "held\n"
    with pytest.raises(workdir_lock.WorkdirInUse, match=f"process {process.pid}"):
      runner.run_recipe(made(0.5), str(tmp_path))
  assert files() == before and len(before) == 3


def test_the_holder_of_the_workdir_removes_notes_of_errors(tmp_path):
  process_errors.note_error(tmp_path, 0, ValueError("a cat"))
  with contextlib.ExitStack() as stack:
    runner.lock_workdir(tmp_path, stack)
    assert process_errors.read_errors(tmp_path) == {}


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*", "what?", "a\\b", "caf\udce9"])
def test_a_path_that_checkpoints_cannot_have_is_refused(tmp_path, name):
  with pytest.raises(UserError, match="workdir=.*use a path"):
    validation.check_workdir_path(tmp_path / name / "run")
