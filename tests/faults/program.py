"""The real program under a fault, with the tiny model: starts, ends, and what is left.

Each run has a TMPDIR of its own. Its processes, decode workers among them, inherit the
variable, by which they are found.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import several, small
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("sft_short", "sft_long", "rm", "ppo", "eval")
LIMIT_S = 900
UNFINISHED = ("*.tmp", "*.part", "*-tmp*", "*.lock", "error_of_process_*")

needs_mount = pytest.mark.skipif(
  subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
  reason="mounting requires user namespaces",
)


def make_command(settings, workdir, **more):
  """The launcher's command line; more: settings, with __ for the dots of their keys."""
  more = {key.replace("__", "."): value for key, value in more.items()}
  settings = {
    **settings,
    "stages": STAGES,
    "ppo.save_every": 1,
    "ppo.minibatches": 2,
    "evaluate.resamples": 50,
    **more,
  }
  return [
    sys.executable, "launch/run.py", "--config=configs/ppo.py",
    f"--workdir={workdir}", *small.flags(settings),
  ]  # fmt: skip


def run(command, **env):
  """Runs a command to its end."""
  return subprocess.run(
    command, cwd=ROOT, env=several.environment(**env), capture_output=True,
    text=True, timeout=LIMIT_S,
  )  # fmt: skip


def start(command, log, **env):
  """Starts a command, whose output goes to a file."""
  with log.open("w") as file:
    return subprocess.Popen(
      command, cwd=ROOT, env=several.environment(**env), stdout=file, stderr=file
    )


def wait_for(is_there, process, log):
  limit = time.monotonic() + LIMIT_S
  while not is_there():
    assert process.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
    time.sleep(0.02)


def check_line(done, code, *words):
  """Checks that a program ends in one line without a traceback."""
  assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
  assert "Traceback" not in done.stderr and "sys.meta_path" not in done.stderr
  line = next(x for x in done.stderr.splitlines() if x.startswith("error: "))
  assert all(word in line for word in words), line


def check_whole(done):
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def find_processes(tmpdir):
  """The processes with this TMPDIR, but zombies."""
  found = []
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      variables = (folder / "environ").read_bytes().split(b"\0")
    except OSError:  # It has ended.
      continue
    if b"TMPDIR=" + os.fsencode(tmpdir) in variables:
      found.append((int(folder.name), (folder / "cmdline").read_bytes()))
  return found


def check_nothing_left(workdir, tmpdir):
  """Checks that a run left no process, no temporary file and no lock."""
  limit = time.monotonic() + 10  # A worker notices the end of its parent.
  while find_processes(tmpdir) and time.monotonic() < limit:
    time.sleep(0.1)
  assert find_processes(tmpdir) == []
  assert [*pathlib.Path(tmpdir).rglob("*")] == []
  assert [path for name in UNFINISHED for path in workdir.rglob(name)] == []


def end(process, log, number, *, workdir, tmpdir, limit_s=60):
  """Sends SIGTERM or SIGINT; the program ends within a bound and leaves nothing."""
  process.send_signal(number)
  code = process.wait(limit_s)
  said = log.read_text()
  assert code == EXIT_RESUMABLE, said[-3000:]
  assert "Traceback" not in said and "the same command resumes the run" in said
  assert signal.Signals(number).name in said
  check_nothing_left(workdir, tmpdir)


def read(workdir):
  """What a run has made: metrics, samples and results."""
  metrics = {
    path.parent.name: small.metrics(path.parent)
    for path in workdir.glob("*/metrics.jsonl")
  }
  names = ("ppo/samples/*", "label/preferences.jsonl", "eval/*.json*")
  files = {
    str(path.relative_to(workdir)): path.read_bytes()
    for name in names
    for path in workdir.glob(name)
    if path.name not in ("done.json", "stage.json", "metrics.jsonl")
  }
  return metrics, files


def copy_before(folder, workdir, stage):
  """Copies a finished workdir without a stage and those after it."""
  shutil.copytree(folder / "run", workdir)
  (workdir / "report.html").unlink()
  for name in STAGES[STAGES.index(stage) :]:
    shutil.rmtree(workdir / name)


def run_mounted(command, folder, size, prepare="", **env):
  """Runs a command whose workdir's parent is a tmpfs, and copies it back after.

  Args:
    command: Arguments.
    folder: Folder with the content; it receives what the run leaves.
    size: Options of the mount, as "size=2m".
    prepare: Commands of the shell that run before, with the tmpfs as $2.
    env: Variables of the program.
  """
  disk = folder.with_name("disk")
  disk.mkdir(exist_ok=True)
  script = f"""
    mount -t tmpfs -o {size} tmpfs "$2" && cp -a "$1/." "$2/" || exit 99
    cd {ROOT} && {{ {prepare or "true"}; }}
    shift 2; "$@"; code=$?
    cd / && mount -o remount,rw "{disk}"; rm -rf "{folder}" && cp -a "{disk}" "{folder}"
    exit $code
  """
  shell = ["unshare", "-rm", "bash", "-c", script, "sh", folder, disk]
  return run([*shell, *command], **env)


def measure_kib(folder):
  return sum(f.stat().st_blocks for f in folder.rglob("*") if f.is_file()) // 2
