"""Soak tests of the launcher: memory over many steps, and many restarts.

JAX_PLATFORMS=cpu python perf/soak.py --folder=/tmp/soak --steps=300
JAX_PLATFORMS=cpu python perf/soak.py --folder=/tmp/soak --restarts=30

The first command records the resident memory, the open file descriptors and the threads
of a PPO run after each step, and fails if they grow. The second sends SIGTERM at random
times and starts the run again. It fails if the results differ from those of an
undisturbed run, or if a process or a temporary file is left.
"""

import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = flags.DEFINE_string("folder", None, "Folder of the runs.", required=True)
STEPS = flags.DEFINE_integer("steps", 300, "PPO steps of the run that is measured.")
RESTARTS = flags.DEFINE_integer("restarts", 0, "Signals to send; 0 measures memory.")
LONGEST_S = flags.DEFINE_float("longest_s", 30.0, "Longest time before a signal.")
SEED = flags.DEFINE_integer("signal_seed", 0, "Seed of the times of the signals.")
EXTRA = flags.DEFINE_multi_string("setting", [], "More settings: SECTION.NAME=VALUE.")

STAGES = ("sft_short", "sft_long", "label", "rm", "ppo")
SETTINGS = {  # All stages are so small that most of the time is PPO's.
  "stages": STAGES,
  "data.sizes.sft": 24,
  "data.sizes.prompts": 24,
  "data.sizes.benchmark": 4,
  "sft.batch_size": 4,
  "sft.short_steps": 6,
  "sft.long_steps": 6,
  "sft.save_every": 2,
  "sft.optimizer.warmup_steps": 0,
  "label.judge": "truth",
  "label.context": "none",
  "label.batch": 8,
  "label.block": 8,
  "rm.batch_size": 2,
  "rm.steps": 6,
  "rm.save_every": 2,
  "rm.optimizer.warmup_steps": 0,
  "ppo.batch_size": 4,
  "ppo.minibatches": 2,
  "ppo.save_every": 10,
  "ppo.samples_every": 10,
  "ppo.optimizer.warmup_steps": 0,
}
RESTART_STEPS = 12  # PPO steps of the runs that are restarted.
WARM_UP = 50  # Steps that are not compared.
MAX_GROWTH = 0.02  # Of the median resident memory.
MAX_MORE = 2  # Open files and threads: pools start threads when they need them.
TEMPORARY = ("*.tmp", "*.part", "*-tmp*")
KILLED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # Before the handler is installed.


class Reading(NamedTuple):
  """The resources of the launcher's process after a step."""

  step: int
  rss_kib: int
  files: int  # Open file descriptors.
  threads: int


def start_run(workdir: pathlib.Path, settings: dict) -> subprocess.Popen:
  """Starts the launcher in a session of its own, with its own temporary folder."""
  temporary = get_temporary_folder(workdir)
  temporary.mkdir(parents=True, exist_ok=True)
  command = [
    sys.executable, "launch/run.py", "--config=configs/ppo.py:tiny",
    f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items()),
  ]  # fmt: skip
  with workdir.with_suffix(".log").open("a") as log:
    return subprocess.Popen(
      command, cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)},
      stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def get_temporary_folder(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder for temporary files of a run."""
  return workdir.with_name(f"{workdir.name}_tmp").absolute()


def read_process(pid: int, step: int) -> Reading:
  """Reads the resources of a process from /proc."""
  lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  status = dict(line.split(":", 1) for line in lines)
  files = len(os.listdir(f"/proc/{pid}/fd"))
  return Reading(
    step, int(status["VmRSS"].split()[0]), files, int(status["Threads"].strip())
  )


def watch_steps(process: subprocess.Popen, metrics: pathlib.Path) -> Iterator[Reading]:
  """Yields a reading after each line of metrics until the process ends."""
  seen = 0
  while process.poll() is None:
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if lines > seen:
      seen = lines
      try:
        yield read_process(process.pid, seen)
      except (OSError, KeyError):  # The process has just ended.
        return
    time.sleep(0.02)


def fit_slope(readings: Sequence[Reading]) -> float:
  """Fits the growth of resident memory in KiB per step by least squares."""
  steps, sizes = zip(*((r.step, r.rss_kib) for r in readings), strict=True)
  return statistics.linear_regression(steps, sizes).slope


def find_growth(readings: Sequence[Reading]) -> list[str]:
  """Returns what grows after the warm-up; [] if nothing does.

  Medians over the first and the last WARM_UP steps after the warm-up are compared. A
  reading during a save has more open files and threads.
  """
  later = [r for r in readings if r.step > WARM_UP]
  parts = [r for r in later if r.step <= 2 * WARM_UP], later[-WARM_UP:]
  grown, words = [], []
  for name in ("rss_kib", "files", "threads"):
    before, after = (statistics.median(getattr(r, name) for r in x) for x in parts)
    words.append(f"{name} {before:.0f} to {after:.0f}")
    if after > (before * (1 + MAX_GROWTH) if name == "rss_kib" else before + MAX_MORE):
      grown.append(words[-1])
  steps = ", ".join(f"{part[0].step} to {part[-1].step}" for part in parts)
  slope = fit_slope(later)
  print(f"medians of steps {steps}: {', '.join(words)}; {slope:.1f} KiB per step")
  return grown


def measure(workdir: pathlib.Path, settings: dict, steps: int) -> list[str]:
  """Runs PPO, writes the readings to WORKDIR.jsonl, and returns the problems."""
  process = start_run(workdir, {**settings, "ppo.steps": steps})
  readings = list(watch_steps(process, workdir / "ppo" / "metrics.jsonl"))
  rows = (json.dumps(r._asdict()) + "\n" for r in readings)
  workdir.with_suffix(".jsonl").write_text("".join(rows))
  if process.wait():
    return [f"exit code {process.returncode}: see {workdir.with_suffix('.log')}"]
  return find_growth(readings) + find_leftovers(workdir, process.pid)


def restart(
  root: pathlib.Path, settings: dict, signals: int, longest_s: float, seed: int
) -> list[str]:
  """Sends signals to runs, starts them again, and returns the problems.

  A finished run is followed by one in a new folder until all signals are sent.
  """
  settings = {**settings, "ppo.steps": RESTART_STEPS, "ppo.save_every": 3}
  whole = root / "whole"
  if start_run(whole, settings).wait():
    return [f"the undisturbed run failed: see {whole.with_suffix('.log')}"]
  rng, problems, sent, number = random.Random(seed), [], 0, 0
  while sent < signals and not problems:
    workdir, code = root / f"run_{number}", EXIT_RESUMABLE
    while code in (EXIT_RESUMABLE, *KILLED):
      delay = rng.uniform(0, longest_s) if sent < signals else None
      process = start_run(workdir, settings)
      code = stop_after(process, delay)
      sent += code in (EXIT_RESUMABLE, *KILLED)
      wait = "undisturbed" if delay is None else f"{delay:.1f} s"
      print(f"run {number}, {wait}: code {code}, {sent} signals", flush=True)
      problems += find_processes(process.pid)
    if code:
      problems.append(f"exit code {code}: see {workdir.with_suffix('.log')}")
    problems += find_leftovers(workdir, process.pid) + compare(whole, workdir)
    number += 1
  return problems


def stop_after(process: subprocess.Popen, delay: float | None) -> int:
  """Sends SIGTERM after a delay unless the process has ended; returns its exit code."""
  try:
    return process.wait(delay)
  except subprocess.TimeoutExpired:
    process.terminate()
    return process.wait()


def compare(whole: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  """Returns the results that differ from those of an undisturbed run."""
  paths = [*whole.glob("*/metrics.jsonl"), *whole.glob("*/samples/*")]
  paths += whole.glob("label/preferences.jsonl")
  names = [path.relative_to(whole) for path in paths]
  return [
    f"{workdir / name} differs"
    for name in names
    if read_rows(whole / name) != read_rows(workdir / name)
  ]


def read_rows(path: pathlib.Path) -> list[dict]:
  """Reads the lines of a file without times; [] without a file."""
  lines = path.read_text().splitlines() if path.exists() else []
  drop = ("time", "phases")
  return [{k: x for k, x in json.loads(y).items() if k not in drop} for y in lines]


def find_leftovers(workdir: pathlib.Path, pid: int) -> list[str]:
  """Returns the processes and the temporary files that a finished run has left."""
  left = [path for pattern in TEMPORARY for path in workdir.rglob(pattern)]
  left += get_temporary_folder(workdir).rglob("*")
  return find_processes(pid) + [f"{path} is left" for path in left]


def find_processes(session: int) -> list[str]:
  """Returns the processes of a session that are alive."""
  alive = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      state, _, _, its_session, *_ = path.read_text().rpartition(")")[2].split()
    except OSError:  # The process has just ended.
      continue
    if int(its_session) == session and state != "Z":
      alive.append(f"process {path.parent.name} is left")
  return alive


def main(argv: list[str]) -> None:
  """Runs the soak test of the flags; exits with code 1 if there are problems."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if not RESTARTS.value and STEPS.value <= 2 * WARM_UP:
    raise app.UsageError(f"--steps must be above {2 * WARM_UP}, got {STEPS.value}")
  settings = SETTINGS | dict(each.split("=", 1) for each in EXTRA.value)
  root = pathlib.Path(FOLDER.value)
  root.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  if RESTARTS.value:
    problems = restart(root, settings, RESTARTS.value, LONGEST_S.value, SEED.value)
  else:
    problems = measure(root / "memory", settings, STEPS.value)
  print(f"{time.monotonic() - start:.0f} s; problems: {problems or 'none'}")
  sys.exit(1 if problems else 0)


if __name__ == "__main__":
  app.run(main)
