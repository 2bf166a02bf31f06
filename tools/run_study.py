"""Runs every arm of tools/study_arms.py for every seed, and writes the results.

python tools/run_study.py --workdir=runs/study
python tools/run_study.py --workdir=runs/study --only=demo,context_none --seeds=0

A finished run is skipped, and a killed run resumes. --doc writes tables and figures
between the markers of a Markdown file. The program takes hours.
"""

import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from tools import study, study_arms, study_docs  # noqa: E402
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE  # noqa: E402

WORKDIR = flags.DEFINE_string("workdir", None, "Folder with the workdirs of all runs.")
SEEDS = flags.DEFINE_list(
  "seeds", [str(seed) for seed in study_arms.SEEDS], "Seeds of the runs."
)
ONLY = flags.DEFINE_list("only", [], "Names of the arms to run; empty: all.")
DOC = flags.DEFINE_string(
  "doc", "", "File with the markers of docs/results.md, or empty."
)
RUN = flags.DEFINE_bool("run", True, "Run the jobs that have no output yet.")
flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
  """Runs the selected jobs and writes the document."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  root = pathlib.Path(WORKDIR.value).absolute()
  names = [arm.name for arm in study_arms.ARMS]
  if unknown := set(ONLY.value) - set(names):
    raise app.UsageError(f"--only must be of {names}, got {sorted(unknown)}")
  if DOC.value and not pathlib.Path(DOC.value).exists():
    raise app.UsageError(
      f"--doc={DOC.value} does not exist: give a file like docs/results.md"
    )
  seeds = [int(seed) for seed in SEEDS.value]
  chosen = set(ONLY.value) or set(names)
  todo = [
    job
    for job in study.list_jobs(study_arms.ARMS, seeds, root)
    if job.arm.name in chosen
  ]
  write = lambda: write_doc(root, seeds)
  failed = run_jobs(todo, root, write) if RUN.value else []
  write()
  if failed:
    print(f"error: {len(failed)} jobs failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1)


def run_jobs(todo: list[study.Job], root: pathlib.Path, write) -> list[str]:
  """Runs each job without an output, and returns the names of failed jobs.

  Args:
    todo: All jobs, in order.
    root: Folder with the workdirs.
    write: Writes the document; called after each job.
  """
  (root / "logs").mkdir(parents=True, exist_ok=True)
  todo, start, failed = [j for j in todo if not j.output.exists()], time.monotonic(), []
  for number, job in enumerate(todo):
    began, code = time.monotonic(), None
    try:
      study.prepare(job)
    except FileNotFoundError as error:
      why = str(error)
    else:
      code = run_command(job, root / "logs" / f"{job.name.replace(': ', '_')}.log")
      why = f"exit code {code}; see {root}/logs"
    now = time.monotonic()
    if code == EXIT_RESUMABLE or (code or 0) < 0:
      print(f"{job.name}: stopped; the same command resumes it", flush=True)
      sys.exit(EXIT_RESUMABLE)
    if code == 0:
      why = f"{now - began:.0f} s"
      study.save_time(root, job.name, now - began)
      write()
    else:
      failed.append(job.name)
    left = (now - start) / 60 / (number + 1) * (len(todo) - number - 1)
    print(
      f"[{number + 1}/{len(todo)}] {job.name}: {'FAILED, ' if code else ''}{why}; "
      f"about {left:.0f} min left",
      flush=True,
    )
  return failed


def run_command(job: study.Job, log: pathlib.Path) -> int:
  """Runs a job's command and returns its exit code.

  SIGTERM and SIGINT to this process are forwarded to the command.

  Args:
    job: The job.
    log: File to which the output is appended.
  """
  with log.open("a") as file:
    child = subprocess.Popen(
      [sys.executable, *job.command], cwd=ROOT, stdout=file, stderr=file
    )
  forward = lambda number, frame: child.send_signal(number)
  before = {
    sign: signal.signal(sign, forward) for sign in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    return child.wait()
  finally:
    for sign, handler in before.items():
      signal.signal(sign, handler)


def write_doc(root: pathlib.Path, seeds: list[int]) -> None:
  """Writes tables and figures into the file of --doc, if there is one."""
  if DOC.value:
    study_docs.write(
      pathlib.Path(DOC.value), study_arms.TABLES, study_arms.SCORES, root, seeds
    )


if __name__ == "__main__":
  app.run(main)
