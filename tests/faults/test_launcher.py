"""Faults of the disk in the real program, with the tiny model and its world."""

import functools
import os
import pathlib
import subprocess
import sys

import pytest

from tests.helpers import several, small
from vlmrlaif_jax.core.errors import EXIT_USER_ERROR
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("sft_short", "sft_long", "rm", "ppo")
LIMIT_S = 900


def make_command(tiny_settings, workdir, **more):
  settings = {
    **tiny_settings,
    "stages": STAGES,
    "ppo.save_every": 1,
    "ppo.minibatches": 2,
    **more,
  }
  return [
    sys.executable, "launch/run.py", "--config=configs/ppo.py",
    f"--workdir={workdir}", *small.flags(settings),
  ]  # fmt: skip


def run(command, **env):
  return subprocess.run(
    command, cwd=ROOT, env=several.environment(**env), capture_output=True,
    text=True, timeout=LIMIT_S,
  )  # fmt: skip


def check_line(done, code, *words):
  """Checks that a program ends in one line without a traceback."""
  assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
  assert "Traceback" not in done.stderr and "sys.meta_path" not in done.stderr
  line = next(x for x in done.stderr.splitlines() if x.startswith("error: "))
  assert all(word in line for word in words), line


def make_file(folder):
  (folder / "run").write_text("")


def make_dangling_link(folder):
  (folder / "run").symlink_to(folder / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(
  "prepare, name, words",
  [
    (make_file, "run", "a file or a dangling link is where a folder must be"),
    (make_dangling_link, "run", "a file or a dangling link is where a folder must be"),
    (make_file, "run/below", "a file is where a folder must be"),
    (lambda folder: None, "x" * 300, "the path is too long"),
    (lambda folder: None, "lr[1e-3]", "use a path without"),
  ],
)
def test_a_workdir_that_cannot_be_written_is_one_line(
  tiny_settings, tmp_path, prepare, name, words
):
  prepare(tmp_path)
  done = run(make_command(tiny_settings, tmp_path / name))
  check_line(done, EXIT_USER_ERROR, words, name[:20])


needs_mount = pytest.mark.skipif(
  subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
  reason="mounting requires user namespaces",
)


def run_mounted(command, folder, size, prepare=""):
  """Runs a command whose workdir's parent is a tmpfs, and copies it back after.

  Args:
    command: Arguments.
    folder: Folder with the content; it receives what the run leaves.
    size: Options of the mount, as "size=2m".
    prepare: Commands of the shell that run before, with the tmpfs as $2.
  """
  disk = folder.with_name("disk")
  disk.mkdir(exist_ok=True)
  script = f"""
    mount -t tmpfs -o {size} tmpfs "$2" && cp -a "$1/." "$2/" || exit 99
    cd {ROOT} && {prepare}
    shift 2; "$@"; code=$?
    cd / && mount -o remount,rw "{disk}"; rm -rf "{folder}" && cp -a "{disk}" "{folder}"
    exit $code
  """
  return run(["unshare", "-rm", "bash", "-c", script, "sh", folder, disk, *command])


@pytest.fixture(scope="module")
def whole(tiny_settings, tmp_path_factory):
  """(command of a workdir, the folder with the workdir of a run left alone)."""
  folder = tmp_path_factory.mktemp("disk") / "whole"
  command = functools.partial(make_command, tiny_settings)
  done = run(command(folder / "run"))
  assert done.returncode == 0, done.stderr[-3000:]
  return command, folder


def read(folder):
  metrics = {stage: small.metrics(folder / "run" / stage) for stage in STAGES}
  samples = sorted((folder / "run" / "ppo" / "samples").iterdir())
  return metrics, [path.read_bytes() for path in samples]


def measure_kib(folder):
  return sum(f.stat().st_blocks for f in folder.rglob("*") if f.is_file()) // 2


@pytest.mark.faults
@needs_mount
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_a_full_disk_ends_in_one_line_and_the_next_start_is_equal(
  whole, tmp_path, share
):
  command, folder = whole
  mine, disk = tmp_path / "mine", tmp_path / "disk"
  mine.mkdir()
  size = f"size={max(int(measure_kib(folder) * share), 8)}k"
  done = run_mounted(command(disk / "run"), mine, size)
  check_line(done, EXIT_RESUMABLE, "no space", str(disk / "run"), "resume")
  assert not [*mine.rglob("done.json.*.tmp")]
  again = run_mounted(command(disk / "run"), mine, "size=200m")
  assert again.returncode == 0, again.stderr[-3000:]
  assert read(mine) == read(folder)


@pytest.mark.faults
@needs_mount
@pytest.mark.parametrize("inodes", [4, 20, 60, 90])
def test_a_disk_without_inodes_ends_in_one_line(whole, tmp_path, inodes):
  command, folder = whole
  mine, disk = tmp_path / "mine", tmp_path / "disk"
  mine.mkdir()
  done = run_mounted(command(disk / "run"), mine, f"size=200m,nr_inodes={inodes}")
  check_line(done, EXIT_RESUMABLE, "no inodes", "resume")
  again = run_mounted(command(disk / "run"), mine, "size=200m")
  assert again.returncode == 0, again.stderr[-3000:]
  assert read(mine) == read(folder)


@pytest.mark.faults
@needs_mount
def test_a_read_only_disk_is_one_line(whole, tmp_path):
  command, _ = whole
  mine, disk = tmp_path / "mine", tmp_path / "disk"
  mine.mkdir()
  prepare = 'mount -o remount,ro "$2"'
  done = run_mounted(command(disk / "run"), mine, "size=200m", prepare)
  check_line(done, EXIT_USER_ERROR, "read-only", str(disk))


@pytest.mark.faults
@pytest.mark.skipif(os.getuid() != 0, reason="only root can run as another user")
def test_a_workdir_of_another_user_is_one_line(whole, tmp_path):
  command, _ = whole
  (tmp_path / "run").mkdir(mode=0o755)
  for path in (*tmp_path.parents[:2], tmp_path):
    path.chmod(0o755)
  as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
  home = {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
  done = run([*as_nobody, *command(tmp_path / "run")], **home)
  check_line(done, EXIT_USER_ERROR, "permission denied", str(tmp_path / "run"))
