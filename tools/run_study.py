"""Runs every arm of tools/study_arms.py for every seed, and writes what came out.

python tools/run_study.py --workdir=runs/study
python tools/run_study.py --workdir=runs/study --only=demo,context_none --seeds=0

A run that is done is not made again, and one that was killed goes on where it was.
--doc puts tables and figures into a Markdown file between its markers. Takes hours.
"""

import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from tools import study, study_docs  # noqa: E402
from tools import study_arms as of  # noqa: E402
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE  # noqa: E402

WORKDIR = flags.DEFINE_string("workdir", None, "Holds the workdirs of all runs.")
SEEDS = flags.DEFINE_list("seeds", [str(seed) for seed in of.SEEDS], "Of the runs.")
ONLY = flags.DEFINE_list("only", [], "Names of arms to run; all, if none are given.")
DOC = flags.DEFINE_string("doc", "", "A file with the markers of docs/results.md.")
RUN = flags.DEFINE_bool("run", True, "Make runs that are not there yet.")
flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  root = pathlib.Path(WORKDIR.value).absolute()
  names = [arm.name for arm in of.ARMS]
  if unknown := set(ONLY.value) - set(names):
    raise app.UsageError(f"--only={sorted(unknown)}: there are {names}")
  if DOC.value and not pathlib.Path(DOC.value).exists():
    raise app.UsageError(f"--doc={DOC.value}: no such file, as docs/results.md is one")
  seeds = [int(seed) for seed in SEEDS.value]
  chosen = set(ONLY.value) or set(names)
  todo = [job for job in study.jobs(of.ARMS, seeds, root) if job.arm.name in chosen]
  write = lambda: write_doc(root, seeds)
  failed = run(todo, root, write) if RUN.value else []
  write()
  if failed:
    print(f"error: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1)


def run(todo: list[study.Job], root: pathlib.Path, write) -> list[str]:
  """Makes each job that is not done; returns the names of those that failed."""
  (root / "logs").mkdir(parents=True, exist_ok=True)
  todo, start, failed = [j for j in todo if not j.done.exists()], time.monotonic(), []
  for number, job in enumerate(todo):
    began, code = time.monotonic(), None
    try:
      study.prepare(job)
    except FileNotFoundError as error:
      why = str(error)
    else:
      code = call(job, root / "logs" / f"{job.name.replace(': ', '_')}.log")
      why = f"exit code {code}; see {root}/logs"
    now = time.monotonic()
    if code == EXIT_RESUMABLE or (code or 0) < 0:
      print(f"{job.name}: stopped; the same command goes on from there", flush=True)
      sys.exit(EXIT_RESUMABLE)
    if code == 0:
      why = f"{now - began:.0f} s"
      study.note_times(root, job.name, now - began)
      write()
    else:
      failed.append(job.name)
    left = (now - start) / 60 / (number + 1) * (len(todo) - number - 1)
    print(
      f"[{number + 1}/{len(todo)}] {job.name}: {'FAILED, ' if code else ''}{why}; "
      f"some {left:.0f} min to go",
      flush=True,
    )
  return failed


def call(job: study.Job, log: pathlib.Path) -> int:
  """The exit code of a job's command; a signal that this is sent goes on to it."""
  with log.open("a") as file:
    child = subprocess.Popen(
      [sys.executable, *job.command], cwd=ROOT, stdout=file, stderr=file
    )
  hand_on = lambda number, frame: child.send_signal(number)
  before = {
    sign: signal.signal(sign, hand_on) for sign in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    return child.wait()
  finally:
    for sign, handler in before.items():
      signal.signal(sign, handler)


def write_doc(root: pathlib.Path, seeds: list[int]) -> None:
  if DOC.value:
    study_docs.write(pathlib.Path(DOC.value), of.TABLES, of.SCORES, root, seeds)


if __name__ == "__main__":
  app.run(main)
