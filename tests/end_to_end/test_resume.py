"""A run that was killed, at whatever moment, ends as one that was left alone.

Through the launcher, with a model of random weights: SFT, reward model and PPO.
"""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import several, small
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("sft_short", "sft_long", "rm", "ppo")
STEPS = 6
LIMIT_S = 600  # For a checkpoint to appear, on a busy machine.


@pytest.fixture(scope="module")
def command(tiny_settings):
  """Starts the launcher on a workdir."""
  settings = {
    **tiny_settings,
    "stages": STAGES,
    "sft.short_steps": STEPS,
    "sft.save_every": 1,
    "sft.keep": 1,
    "ppo.steps": STEPS,
    "ppo.save_every": 1,
    "ppo.minibatches": 2,
  }

  def start(workdir):
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
      return subprocess.Popen(
        [
          sys.executable, ROOT / "launch" / "run.py", "--config=configs/ppo.py",
          f"--workdir={workdir}", *small.flags(settings),
        ],
        cwd=ROOT, env=several.environment(), stdout=log, stderr=log,
      )  # fmt: skip

  return start


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
  """The workdir of a run that was left alone; what it compiled serves the others."""
  workdir = tmp_path_factory.mktemp("resume") / "whole"
  finish(command(workdir), workdir)
  return workdir


def finish(process, workdir):
  log = workdir.parent / f"{workdir.name}.log"
  assert process.wait(LIMIT_S) == 0, log.read_text()[-3000:]


def kill(process, workdir, stage, delay):
  """SIGKILL, `delay` seconds after the stage has its first checkpoint."""
  limit = time.monotonic() + LIMIT_S
  while not saved_steps(workdir, stage):
    assert process.poll() is None and time.monotonic() < limit, f"no {stage} to kill"
    time.sleep(0.01)
  time.sleep(delay)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL, "it had ended before"


def end(process, workdir, stage):
  """SIGTERM, once the stage has begun; it ends after the step that it is in."""
  limit = time.monotonic() + LIMIT_S
  log = workdir.parent / f"{workdir.name}.log"
  while f"{stage}: compiling" not in log.read_text():
    assert process.poll() is None and time.monotonic() < limit, f"no {stage} to end"
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  assert process.wait(LIMIT_S) == EXIT_RESUMABLE, log.read_text()[-3000:]
  assert saved_steps(workdir, stage) and not (workdir / stage / "done.json").exists()


def saved_steps(workdir, stage):
  names = [path.name for path in workdir.glob(f"{stage}/checkpoints/*")]
  return [int(name) for name in names if name.isdigit()]


@pytest.fixture(scope="module")
def killed(command, whole):
  """The workdir of a run that was killed in SFT and in PPO, at random moments, and
  asked to end in between.
  """
  workdir = whole.parent / "killed"
  for stage in ("sft_short", "ppo"):
    if stage == "ppo":
      end(command(workdir), workdir, "rm")
    delay = random.uniform(0, 1.0)
    print(f"{stage}: to be killed {delay:.3f} s after its first checkpoint")
    kill(command(workdir), workdir, stage, delay)
  finish(command(workdir), workdir)
  return workdir


def params(workdir, stage):
  """Path -> array of a stage's last checkpoint."""
  (step,) = saved_steps(workdir, stage)
  tree = ocp.StandardCheckpointer().restore(
    (workdir / stage / "checkpoints" / str(step) / "params").absolute()
  )
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_bitwise_those_of_a_run_left_alone(whole, killed, stage):
  want, got = params(whole, stage), params(killed, stage)
  assert saved_steps(killed, stage) == saved_steps(whole, stage)
  assert want.keys() == got.keys() and len(want) > 10
  for name, array in want.items():
    np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_are_those_of_a_run_left_alone(whole, killed, stage):
  lines = small.metrics(killed / stage)
  assert lines == small.metrics(whole / stage)
  assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_samples_are_those_of_a_run_left_alone(whole, killed):
  written = lambda workdir: {
    path.name: path.read_bytes() for path in workdir.glob("ppo/samples/*")
  }
  assert written(killed) == written(whole) and len(written(whole)) == STEPS


@pytest.mark.parametrize("stage", ["sft_short", "ppo"])
def test_a_killed_stage_went_on_and_did_not_begin_again(killed, stage):
  said = (killed.parent / "killed.log").read_text()
  begun = [
    int(line.rpartition(" ")[2])
    for line in said.splitlines()
    if line.startswith(f"{stage}: compiling")
  ]
  assert begun[0] == 0 and len(begun) <= 2
  assert len(begun) == 1 or begun[1] >= 1  # 1: it was done when it was killed.


def test_done_stages_say_what_they_did(whole):
  done = json.loads((whole / "rm" / "done.json").read_text())
  assert done["summary"]["pairs"] > 0 and done["seconds"] > 0
