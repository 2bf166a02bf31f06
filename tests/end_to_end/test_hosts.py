"""A recipe in several processes: as in one, through a death, and on another mesh.

Four processes begin, and one of them is killed; two go on on another mesh, of which one
is asked to end; started again they do all of the recipe. It is held against one process
that was left alone. The meshes have the devices in no order of their processes, as
those of TPUs may.
"""

import json
import os
import signal
import time

import numpy as np
import pytest

from tests.helpers import several, small
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE

LEARN = ("sft_short", "sft_long", "rm", "ppo")
STEPS = 6
ENDED = "rm"  # The stage in which one is asked to end.
# What stands for launch/run.py: with the devices of a mesh in the order that is given,
# and with labels also where preferences are given. Parents of others only start them.
PROGRAM = """
import runpy, sys
from launch import supervisor

order = eval(sys.argv.pop(1))
if supervisor.is_child() or "--process=" not in " ".join(sys.argv):
  import jax
  from vlmrlaif_jax.core import sharding
  from vlmrlaif_jax.stages.stage import load_stages

  plain = sharding.make_mesh


  def make_mesh(devices=None, **sizes):
    return plain(**sizes, devices=devices or [jax.devices()[i] for i in order])


  sharding.make_mesh = make_mesh
  stages = load_stages()
  stages["label"] = stages["label"]._replace(is_needed=lambda config: True)
sys.argv[0] = "launch/run.py"
runpy.run_path("launch/run.py", run_name="__main__")
"""
HEARTBEAT_S = 25  # Four processes that compile on two cores may be silent long.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("hosts")  # What one has compiled serves others in it.


@pytest.fixture(scope="module")
def recipe(tiny_settings, root):
  """Starts the launcher in so many processes on a workdir below the root."""
  settings = {
    **tiny_settings,
    "data.prompt_len": 112,
    "sft.short_steps": STEPS,
    "sft.save_every": 1,
    "label.context": "none",
    "label.samples": 2,
    "label.block": 8,
    "label.judge_prompt_len": 160,
    "label.judge_max_new": 4,
    "ppo.minibatches": 2,
    "evaluate.resamples": 50,
  }

  (root / "program.py").write_text(PROGRAM)

  def start(name, processes, *, order, **mesh):
    mesh = {f"mesh.{axis}": size for axis, size in mesh.items()}

    def command(coordinator, number):
      given = [
        f"--coordinator={coordinator}",
        f"--processes={processes}",
        f"--process={number}",
        f"--heartbeat_s={HEARTBEAT_S}",
      ]
      return [
        str(root / "program.py"),
        str(order),
        "--config=configs/ppo.py",
        f"--workdir={root / name}",
        *small.flags(settings | mesh),
        *(given if processes > 1 else []),
      ]

    logs = root / f"{name}_{processes}"
    devices = len(order) // processes
    return several.start(command, processes, logs, devices=devices), logs

  return start


@pytest.fixture(scope="module")
def alone(recipe, root):
  """The workdir of one process that was left alone."""
  several.finish(*recipe("alone", 1, order=[0, 1], data=1, fsdp=2))
  return root / "alone"


class Death(dict):
  """What each of the others said, by number, its exit code, and after how long."""


@pytest.fixture(scope="module")
def death(recipe, root, alone):
  """Four processes, of which one is killed after the first checkpoint."""
  started, logs = recipe("together", 4, order=[2, 0, 3, 1], data=2, fsdp=1, tensor=2)
  saved = lambda: list(root.glob("together/sft_short/checkpoints/[0-9]"))
  wait_for(saved, started, logs)
  killed = 2
  # The launcher alone: its child must not outlive it.
  started[killed].kill()
  begun = time.monotonic()
  codes = [process.wait(120) for process in started]
  seconds = time.monotonic() - begun
  assert codes[killed] == -signal.SIGKILL
  others = [number for number in range(4) if number != killed]
  return Death(
    codes={number: codes[number] for number in others},
    said={number: several.said(logs, number) for number in others},
    seconds=seconds,
    killed=killed,
  )


def wait_for(there, started, logs):
  limit = time.monotonic() + 600
  while not there():
    for number, process in enumerate(started):
      assert process.poll() is None, several.said(logs, number)[-3000:]
    assert time.monotonic() < limit
    time.sleep(0.02)


@pytest.fixture(scope="module")
def ended(recipe, root, death):
  """(exit codes, logs) of two processes, of which one was asked to end in a stage."""
  started, logs = recipe("together", 2, order=[1, 0], data=2, fsdp=1)
  wait_for(lambda: f"{ENDED}: compiling" in several.said(logs, 0), started, logs)
  started[1].send_signal(signal.SIGTERM)  # The one that does not write.
  codes = [process.wait(240) for process in started]
  saved = [path.name for path in root.glob(f"together/{ENDED}/checkpoints/[0-9]")]
  return codes, [several.said(logs, number) for number in range(2)], saved


@pytest.fixture(scope="module")
def together(recipe, root, ended):
  """The workdir of the four, finished by two on another mesh, and their logs."""
  started, logs = recipe("together", 2, order=[1, 0], data=2, fsdp=1)
  several.finish(started, logs)
  return root / "together", logs


# One of them dies.


def test_the_others_end_within_a_minute_and_are_resumable(death):
  assert death["seconds"] < 60
  assert set(death["codes"].values()) == {EXIT_RESUMABLE}


def test_the_others_name_who_died_and_what_to_do(death):
  for said in death["said"].values():
    named = f"stopped sending heartbeats):\n{death['killed']}\n"
    assert named in said  # JAX's own message.
    last = said[said.rindex("error: ") :]
    assert "peer process was lost" in last and "same command to resume" in last


def test_no_process_is_left_behind(death, root):
  commands = []
  for entry in os.scandir("/proc"):
    if entry.name.isdecimal():
      try:
        commands.append(open(f"/proc/{entry.name}/cmdline").read())
      except OSError:  # It has ended by now.
        continue
  assert not [c for c in commands if f"--workdir={root / 'together'}" in c]


# One of them is asked to end.


def test_all_end_alike_where_one_is_asked_to(ended):
  codes, _, _ = ended
  assert codes == [EXIT_RESUMABLE, EXIT_RESUMABLE]


def test_what_they_did_is_saved_and_told_once(ended):
  _, (first, second), saved = ended
  told = f"{ENDED}: step {saved[0]} of 2 is done and saved; the same command resumes"
  assert len(saved) == 1 and told in first and "resumes" not in second


# All of them are started with a user's error.


def test_a_users_error_is_named_and_not_resumable(root):
  command = lambda coordinator, number: [
    "launch/run.py",
    "--config=configs/ppo.py:7b",
    f"--workdir={root / 'refused'}",
    f"--coordinator={coordinator}",
    "--processes=2",
    f"--process={number}",
  ]
  started = several.start(command, 2, root / "refused_logs", devices=1)
  codes = [process.wait(240) for process in started]
  # One that has not printed its own error when process 0 ends prints that of process 0.
  assert codes[0] == 2 and codes[1] in (1, 2)
  for number in range(2):
    assert "model.path" in several.said(root / "refused_logs", number)


# Others go on.


@pytest.mark.parametrize("stage", ["sft_short", "rm"])
def test_the_run_goes_on_and_does_not_begin_again(ended, together, stage):
  said = ended[1][0] if stage == "sft_short" else several.said(together[1], 0)
  (line,) = [
    line for line in said.splitlines() if line.startswith(f"{stage}: compiling")
  ]
  assert int(line.rpartition(" ")[2]) >= 1


@pytest.mark.parametrize("stage", LEARN)
def test_metrics_are_those_of_one_process(alone, together, stage):
  want, got = small.metrics(alone / stage), small.metrics(together[0] / stage)
  assert [line["step"] for line in got] == [line["step"] for line in want]
  for here, there in zip(got, want, strict=True):
    assert here.keys() == there.keys()
    for name, value in there.items():
      np.testing.assert_allclose(here[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_responses_are_those_of_one_process(alone, together):
  read = lambda workdir: [
    (row["id"], row["response"])
    for path in sorted(workdir.glob("ppo/samples/step_*.jsonl"))
    for row in map(json.loads, path.read_text().splitlines())
  ]
  # Four of each of two steps.
  assert read(together[0]) == read(alone) and len(read(alone)) == 8


def test_labels_are_those_of_one_process(alone, together):
  """But for a token where two were as close as the rounding of six updates."""
  name = "label/blocks/block_00000.jsonl"
  one, two = ((at / name).read_text().splitlines() for at in (alone, together[0]))
  id_of = lambda line: json.loads(line)["id"]
  assert list(map(id_of, two)) == list(map(id_of, one)) and len(one) == 8
  assert sum(a != b for a, b in zip(one, two, strict=True)) <= 1


def test_results_are_those_of_one_process(alone, together):
  def read(workdir):
    return json.loads((workdir / "eval/results.json").read_text())["held_out"]

  want, got = read(alone), read(together[0])
  assert got["questions"] == want["questions"] > 0
  for policy, measures in want["policies"].items():
    for name, stats in measures.items():
      mean = got["policies"][policy][name]["mean"]
      assert mean == pytest.approx(stats["mean"], rel=1e-3, abs=1e-4)


# Who writes and who reads.


def test_the_first_process_alone_speaks_and_writes(together):
  workdir, logs = together
  said = several.said(logs, 0)
  assert "2 processes with 2 devices (cpu), 1 of them on this process" in said
  assert "ppo: done" in said and "report:" in said
  assert "done" not in several.said(logs, 1)
  assert len(list(workdir.glob("ppo/tensorboard/*"))) == 1
  lines = (workdir / "ppo/metrics.jsonl").read_text().splitlines()
  assert len(lines) == 2


def test_checkpoints_are_written_by_all(together):
  parts = list(together[0].glob("ppo/checkpoints/*/params/ocdbt.process_*"))
  assert {path.name for path in parts} == {"ocdbt.process_0", "ocdbt.process_1"}
