"""Signals in every stage of the real program, and processes that are killed."""

import random
import signal
import time

import pytest

from tests.faults.program import (
  LIMIT_S,
  check_nothing_left,
  check_whole,
  copy_before,
  end,
  find_processes,
  read,
  run,
  start,
  wait_for,
)
from tests.helpers import several
from vlmrlaif_jax.core import interrupts
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE

pytestmark = pytest.mark.faults
STAGES = ("sft_short", "sft_long", "label", "eval")
LABELS = {
  "stages": STAGES,
  "rm.preferences": "",
  "label.context": "none",
  "label.samples": 2,
  "label.block": 1,
  "label.judge_prompt_len": 160,
  "label.judge_max_new": 4,
}


def there(pattern):
  return lambda workdir, tmpdir, log: any(workdir.glob(pattern))


def said(words):
  return lambda workdir, tmpdir, log: words in log.read_text()


def has_decoder(workdir, tmpdir, log):
  return any(b"vlmrlaif_jax.data.video" in line for _, line in find_processes(tmpdir))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
  "stage, moment",
  [
    ("sft_short", has_decoder),
    ("sft_short", said("sft_short: compiling")),
    ("rm", said("rm: compiling")),
    ("ppo", said("ppo: compiling")),
    ("eval", there("eval/stage.json")),
  ],
  ids=["decoding", "compiling", "rm", "ppo", "evaluating"],
)
def test_a_signal_ends_the_run_and_the_next_start_is_equal(
  whole, tmp_path, tmpdir, stage, moment, number
):
  command, folder = whole
  workdir, log = tmp_path / "run", tmp_path / "log"
  if stage != "sft_short":
    copy_before(folder, workdir, stage)
  command = command(workdir, **{"data.workers": 2})
  process = start(command, log, TMPDIR=str(tmpdir))
  wait_for(lambda: moment(workdir, tmpdir, log), process, log)
  end(process, log, number, workdir=workdir, tmpdir=tmpdir)
  assert not (workdir / stage / "done.json").exists()
  check_whole(run(command, TMPDIR=str(tmpdir)))
  check_nothing_left(workdir, tmpdir)
  assert read(workdir) == read(folder / "run")


def test_a_signal_between_blocks_of_labels_loses_no_block(whole, tmp_path, tmpdir):
  command, _ = whole
  whole, workdir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
  check_whole(run(command(whole, **LABELS)))
  process = start(command(workdir, **LABELS), log, TMPDIR=str(tmpdir))
  blocks = lambda: sorted(workdir.glob("label/blocks/*.jsonl"))
  wait_for(blocks, process, log)
  end(process, log, signal.SIGTERM, workdir=workdir, tmpdir=tmpdir)
  times = {path: path.stat().st_mtime_ns for path in blocks()}
  check_whole(run(command(workdir, **LABELS)))
  assert {path: path.stat().st_mtime_ns for path in times} == times
  assert len(times) < len(blocks()) and read(workdir) == read(whole)


def test_a_signal_after_the_last_stage_lets_the_report_be_written(
  whole, tmp_path, tmpdir
):
  command, folder = whole
  workdir, log = tmp_path / "run", tmp_path / "log"
  copy_before(folder, workdir, "eval")
  process = start(command(workdir), log, TMPDIR=str(tmpdir))
  wait_for((workdir / "eval" / "done.json").exists, process, log)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 0, log.read_text()[-3000:]
  assert (workdir / "report.html").exists()
  check_nothing_left(workdir, tmpdir)


def test_a_second_signal_ends_a_compilation_and_the_next_start_is_equal(
  whole, tmp_path, tmpdir
):
  command, folder = whole
  workdir, log = tmp_path / "run", tmp_path / "log"
  copy_before(folder, workdir, "ppo")
  process = start(command(workdir), log, TMPDIR=str(tmpdir))
  wait_for(lambda: "ppo: compiling" in log.read_text(), process, log)
  process.send_signal(signal.SIGINT)
  wait_for(lambda: "SIGINT: this step" in log.read_text(), process, log)
  time.sleep(interrupts.DUPLICATE_S + 0.1)
  process.send_signal(signal.SIGINT)
  code = process.wait(10)
  assert code in (128 + signal.SIGINT, EXIT_RESUMABLE)  # The step may have ended.
  check_whole(run(command(workdir), TMPDIR=str(tmpdir)))
  check_nothing_left(workdir, tmpdir)
  assert read(workdir) == read(folder / "run")


def test_a_stopped_run_continues_and_its_results_are_equal(whole, tmp_path, tmpdir):
  command, folder = whole
  workdir, log = tmp_path / "run", tmp_path / "log"
  copy_before(folder, workdir, "ppo")
  process = start(command(workdir), log, TMPDIR=str(tmpdir))
  wait_for(lambda: "ppo: compiling" in log.read_text(), process, log)
  process.send_signal(signal.SIGSTOP)
  time.sleep(5)
  refused = run(command(workdir))
  process.send_signal(signal.SIGCONT)
  assert refused.returncode == 2 and f"process {process.pid}" in refused.stderr
  assert process.wait(LIMIT_S) == 0, log.read_text()[-3000:]
  check_nothing_left(workdir, tmpdir)
  assert read(workdir) == read(folder / "run")


def test_a_process_of_two_that_is_killed_ends_the_other_one(whole, tmp_path, tmpdir):
  """At a random time; two of the same kind that were left alone are compared."""
  command, _ = whole

  def begin(name):
    make = lambda coordinator, number: [
      *command(tmp_path / name)[1:],
      f"--coordinator={coordinator}",
      "--processes=2",
      f"--process={number}",
      "--heartbeat_s=10",
    ]
    return several.start(
      make, 2, tmp_path / f"{name}_log", devices=1, TMPDIR=str(tmpdir)
    )

  several.finish(begin("alone"), tmp_path / "alone_log")
  delay, killed = random.uniform(0, 20), random.choice([0, 1])
  print(f"process {killed} is killed {delay:.2f} s after they are connected")
  started = begin("run")
  log = tmp_path / "run_log" / "0"
  wait_for((tmp_path / "run" / "config.json").exists, started[0], log)
  time.sleep(delay)
  started[killed].kill()
  begun = time.monotonic()
  codes = [process.wait(120) for process in started]
  assert time.monotonic() - begun < 90
  other = several.said(tmp_path / "run_log", 1 - killed)
  assert codes[1 - killed] == EXIT_RESUMABLE, other[-3000:]
  several.finish(begin("run"), tmp_path / "run_log")
  check_nothing_left(tmp_path / "run", tmpdir)
  assert read(tmp_path / "run") == read(tmp_path / "alone")
