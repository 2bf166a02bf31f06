"""The parent of one of several processes: exit codes and messages of real children."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import supervisor
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE
from vlmrlaif_jax.recipes import process_errors
from vlmrlaif_jax.training.alarms import EXIT_ALARM

SLURM = dict.fromkeys(supervisor.SLURM, "0")
# Runs its first argument as a supervised child, with the second as the workdir.
PARENT = """
import pathlib, sys
from launch import supervisor
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(supervisor.run_child(command, pathlib.Path(sys.argv[2])))
"""
WAITS = """
import os, signal, sys, time
from launch import supervisor
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE
supervisor.end_with_parent()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_RESUMABLE))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def supervise(code, workdir):
  """Starts a parent whose child runs the code."""
  return subprocess.Popen(
    [sys.executable, "-c", PARENT, code, str(workdir)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def end_of(code, workdir):
  """(exit code, stderr) of a parent whose child runs the code."""
  parent = supervise(code, workdir)
  return parent.wait(30), parent.stderr.read()


@pytest.mark.parametrize("code", [0, 1, 2, EXIT_ALARM, EXIT_RESUMABLE])
def test_exit_code_of_a_child_is_passed_on_in_silence(tmp_path, code):
  assert end_of(f"raise SystemExit({code})", tmp_path) == (code, "")


def test_aborted_child_is_resumable_and_its_parent_names_the_cause(tmp_path):
  code, said = end_of("import os; os.abort()", tmp_path)
  assert code == EXIT_RESUMABLE
  assert "peer process was lost" in said
  assert "--heartbeat_s" in said and "--start_s" in said


# Writes a note as another process does, and is aborted.
NOTES = """
import os, pathlib, sys
from vlmrlaif_jax.recipes import process_errors
process_errors.note_error(pathlib.Path({workdir!r}), 1, ValueError("a cat"))
os.abort()
"""


def test_error_of_another_process_is_named_and_not_resumable(tmp_path):
  code, said = end_of(NOTES.format(workdir=str(tmp_path)), tmp_path)
  assert code == 1 and "process 1: ValueError: a cat" in said


def test_error_of_an_earlier_start_counts_no_more(tmp_path):
  process_errors.note_error(tmp_path, 1, ValueError("a cat"))
  code, said = end_of("import os; os.abort()", tmp_path)
  assert code == EXIT_RESUMABLE and "a cat" not in said


@pytest.mark.parametrize("name", ["error_1.txt", "error_of_process_x.txt"])
def test_file_of_the_user_is_no_note_and_stays(tmp_path, name):
  (tmp_path / name).write_text("mine")
  assert process_errors.read_errors(tmp_path) == {}
  process_errors.forget_errors(tmp_path)
  assert (tmp_path / name).read_text() == "mine"


def test_note_is_not_written_through_a_link(tmp_path):
  (tmp_path / "other").write_text("mine")
  (tmp_path / "error_of_process_1.txt").symlink_to(tmp_path / "other")
  process_errors.note_error(tmp_path, 1, ValueError("a cat"))
  assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_signal_that_killed_a_child_is_named(tmp_path, number):
  code, said = end_of(f"import os; os.kill(os.getpid(), {number:d})", tmp_path)
  assert code == 128 + number and number.name in said


@pytest.mark.parametrize(
  "env, several",
  [
    ({}, False),
    (SLURM | {"SLURM_NTASKS": "4"}, True),
    (SLURM | {"SLURM_NTASKS": "1"}, False),
    ({"SLURM_NTASKS": "4"}, False),  # A batch script, or a shell: not yet a task.
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
  ],
)
def test_a_cluster_is_known_by_its_environment(env, several):
  assert supervisor.is_in_cluster(env) == several


def test_sigterm_reaches_the_child_and_its_exit_code_is_passed_on(tmp_path):
  parent = supervise(WAITS, tmp_path)
  parent.stdout.readline()  # The child runs.
  parent.terminate()
  assert parent.wait(30) == EXIT_RESUMABLE


def test_child_ends_with_a_parent_that_was_killed(tmp_path):
  parent = supervise(WAITS, tmp_path)
  child = int(parent.stdout.readline())
  parent.kill()
  assert parent.stdout.read() == ""  # Returns once the child has closed it, too.
  deadline = time.monotonic() + 10
  while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
    time.sleep(0.05)
  state = f"/proc/{child}/stat"
  assert not os.path.exists(state) or open(state).read().split()[2] == "Z"
