"""What is said of the end of one of several processes, and with which exit code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import supervisor

FATAL = "F0101 client.h:80] the JAX distributed service detected fatal errors. "
DIED = FATAL + "UNAVAILABLE: unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks"
LEADER = FATAL + "UNAVAILABLE: Either the leader task was preempted/died/restarted"
ALONE = FATAL + "DEADLINE_EXCEEDED\n\nRPC: /xla.CoordinationService/RegisterTask"
SLURM = dict.fromkeys(supervisor.SLURM, "0")


def save(workdir, stage, step, *, done=False):
  (workdir / stage / "checkpoints" / str(step)).mkdir(parents=True)
  if done:
    (workdir / stage / "done.json").write_text("{}")


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75])
def test_a_child_that_ends_by_itself_has_said_why(tmp_path, code):
  assert supervisor.explain(code, DIED, tmp_path, 0) == ("", code)


def test_who_died_and_what_to_do_is_told(tmp_path):
  save(tmp_path, "sft_long", 50, done=True)
  save(tmp_path, "ppo", 20)
  told, code = supervisor.explain(-signal.SIGABRT, DIED, tmp_path, 0)
  assert code == 75
  assert "process 1 and process 3 died, and process 0 cannot go on alone" in told
  assert "--heartbeat_s" in told
  assert "Start all processes again with the same command" in told
  assert "the run goes on from step 20 of ppo" in told


def test_the_death_of_process_0_is_told_too(tmp_path):
  told, code = supervisor.explain(-signal.SIGABRT, LEADER, tmp_path, None)
  assert code == 75 and "process 0 died, and this process cannot" in told
  assert "the beginning of the stage" in told


@pytest.mark.parametrize(
  "said",
  [
    "ValueError: UNKNOWN: Gloo AllGather failed: [a.cc:1] Connection closed by peer",
    "task is set to ERROR: UNAVAILABLE: Task 2 heartbeat timeout.",  # Of a save.
  ],
)
def test_a_collective_that_lost_a_process_is_told_as_its_death(tmp_path, said):
  told, code = supervisor.explain(-signal.SIGABRT, said, tmp_path, 0)
  assert code == 75 and "another process died, and process 0 cannot go on" in told


def test_an_error_elsewhere_is_told_and_not_to_be_met_again(tmp_path):
  supervisor.note_error(tmp_path, 1, ValueError("a cat"))
  told, code = supervisor.explain(-signal.SIGABRT, DIED, tmp_path, 0)
  assert code == 1 and "process 1 met ValueError: a cat" in told
  supervisor.forget_errors(tmp_path)
  assert supervisor.explain(-signal.SIGABRT, DIED, tmp_path, 0)[1] == 75


def test_waiting_in_vain_is_told_with_the_flags(tmp_path):
  told, code = supervisor.explain(-signal.SIGABRT, ALONE, tmp_path, 2)
  assert code == 1 and "process 2 has waited for the others in vain" in told
  assert all(flag in told for flag in ("--coordinator", "--processes", "--start_s"))


def test_a_kill_is_told_with_the_usual_cause(tmp_path):
  told, code = supervisor.explain(-signal.SIGKILL, "", tmp_path, 1)
  assert code == 137 and "process 1 was ended by SIGKILL" in told and "memory" in told


TALK = "node7:27255:27850 [0] NCCL INFO Connection closed by peer\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("said", [TALK, DIED])
def test_a_kill_is_told_as_such_whatever_was_said_before(tmp_path, number, said):
  told, code = supervisor.explain(-number, said, tmp_path, 1)
  assert code == 128 + number and f"was ended by {number.name}" in told


def test_what_nccl_tells_of_itself_is_no_death(tmp_path):
  told, code = supervisor.explain(-signal.SIGABRT, TALK, tmp_path, 1)
  assert code == 128 + signal.SIGABRT and "was ended by SIGABRT" in told


def test_a_process_that_nccl_has_lost_is_told_of(tmp_path):
  said = (
    f"{TALK}nccl_utils.cc:216: NCCL operation async_err failed: remote process exited "
    "or there was a network error"
  )
  told, code = supervisor.explain(-signal.SIGABRT, said, tmp_path, 1)
  assert code == 75 and "another process died" in told


def test_what_a_scheduler_has_ended_is_to_be_started_again(tmp_path):
  assert supervisor.explain(-signal.SIGTERM, "", tmp_path, 1)[1] == 75


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
  assert supervisor.in_cluster(env) == several


def python(code, **given):
  return subprocess.Popen([sys.executable, "-c", code], text=True, **given)


CHILD = """
import os, signal, sys, time
from launch import supervisor
supervisor.end_with_parent()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import pathlib, sys
from launch import supervisor
command = [sys.executable, "-c", {CHILD!r}]
sys.exit(supervisor.run(command, pathlib.Path("."), 0))
"""


def test_sigterm_reaches_the_child_and_its_code_is_ours():
  parent = python(PARENT, stdout=subprocess.PIPE)
  parent.stdout.readline()  # It runs.
  parent.terminate()
  assert parent.wait(30) == 75


def test_a_child_ends_with_a_parent_that_was_killed():
  parent = python(PARENT, stdout=subprocess.PIPE)
  child = int(parent.stdout.readline())
  parent.kill()
  assert parent.stdout.read() == ""  # Returns once the child has closed it, too.
  deadline = time.monotonic() + 10
  while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
    time.sleep(0.05)
  state = f"/proc/{child}/stat"
  assert not os.path.exists(state) or open(state).read().split()[2] == "Z"
