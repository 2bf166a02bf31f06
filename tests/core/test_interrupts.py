"""Signals in a process of their own, and traces of the steps that were asked for."""

import gzip
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.helpers import small
from tests.training import test_loop as toy
from vlmrlaif_jax.core import interrupts, profiling

ROOT = pathlib.Path(__file__).parents[2]
# Trains the toy of test_loop; step 2 is told of, and takes a while.
PROGRAM = """
import pathlib, sys, time
from tests.training import test_loop as toy
from vlmrlaif_jax.core import interrupts
from vlmrlaif_jax.training.job import Hooks
folder, hangs = pathlib.Path(sys.argv[1]), sys.argv[2] == "hangs"
stop = interrupts.StopSignal()
stop.install()
def on_step(step, batch, info):
  if step == 2:
    print("at step 2", flush=True)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and (hangs or not stop.signal):
      time.sleep(0.01)
  return {}
try:
  hooks, watch = Hooks(after_step=on_step), interrupts.StageMonitor(stop)
  toy.run(folder, hooks=hooks, save_every=100, watch=watch)
except interrupts.Stopped as stopped:
  print(stopped)
  sys.exit(interrupts.EXIT_RESUMABLE)
"""


def signalled(folder, *numbers, step="waits", wait=0.02):
  """(exit code, output) of a training that is sent signals at its step 2."""
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, folder, step],
    cwd=ROOT, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  said = [process.stdout.readline()]
  assert said == ["at step 2\n"]
  for number in numbers:
    process.send_signal(number)
    time.sleep(wait)
  said += process.stdout.readlines()
  return process.wait(60), "".join(said)


def test_sigterm_finishes_the_step_saves_and_goes_on_bit_by_bit(tmp_path):
  # Twice: a scheduler's own, and what a parent passes on, are one.
  code, said = signalled(tmp_path / "cut", signal.SIGTERM, signal.SIGTERM)
  assert code == interrupts.EXIT_RESUMABLE
  assert "SIGTERM: this step is finished and saved" in said
  assert "toy: step 3 of 5 is done and saved" in said
  assert [line["step"] for line in small.metrics(tmp_path / "cut")] == [1, 2, 3]
  resumed, whole = toy.run(tmp_path / "cut"), toy.run(tmp_path / "whole")
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  assert small.metrics(tmp_path / "cut") == small.metrics(tmp_path / "whole")


def test_a_second_signal_ends_at_once_even_a_step_that_hangs(tmp_path):
  start = time.monotonic()
  code, _ = signalled(tmp_path, signal.SIGINT, signal.SIGINT, step="hangs", wait=1.5)
  assert code == 128 + signal.SIGINT and time.monotonic() - start < 50
  assert not (tmp_path / "checkpoints").exists()


def test_what_the_processes_agree_on_counts():
  heard = []
  stop = interrupts.StopSignal(agreed=lambda asked: heard.append(asked) or True)
  assert stop() and heard == [False]


# Blocks.


def test_a_run_ends_between_blocks_and_keeps_what_is_done():
  asked, made = iter([False, False, True]), []
  minded = interrupts.StageMonitor(stop=lambda: next(asked))
  make = minded.wrap_blocks(lambda block: made.append(block))
  with pytest.raises(interrupts.Stopped, match="8 rows"):
    for start in range(0, 20, 4):
      make(range(start, start + 4))
  assert made == [range(0, 4), range(4, 8)]


# Traces.


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
  """A training with a trace of its steps 1 and 2; (folder, notes)."""
  folder, notes = tmp_path_factory.mktemp("traced"), []
  with profiling.ProfilerTrace(
    range(1, 3), str(folder / "trace"), notes.append
  ) as trace:
    toy.run(folder, watch=interrupts.StageMonitor(step=trace.step))
  return folder, notes


def events(folder):
  (path,) = folder.glob("trace/plugins/profile/*/perfetto_trace.json.gz")
  return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_trace_holds_the_phases_by_name(traced):
  names = {event.get("name") for event in events(traced[0])}
  assert {"data", "sample", "prepare", "update", "log", "save"} <= names


def test_trace_is_of_the_steps_asked_for(traced):
  steps = [event["args"] for event in events(traced[0]) if event.get("name") == "step"]
  assert [step["step_num"] for step in steps] == ["1", "2"]


def test_trace_says_where_it_is_and_how_to_open_it(traced):
  (note,) = traced[1]
  assert str(traced[0] / "trace") in note and "ui.perfetto.dev" in note


def test_a_stage_that_ends_within_the_steps_has_a_trace(tmp_path):
  with profiling.ProfilerTrace(range(1, 9), str(tmp_path), lambda text: None) as trace:
    with trace.step(1):
      pass
  assert list(tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz"))
