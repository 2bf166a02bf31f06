"""Faults of the disk in the real program, with the tiny model and its world."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.faults.program import (
  LIMIT_S,
  check_line,
  check_nothing_left,
  check_whole,
  copy_before,
  make_command,
  measure_kib,
  needs_mount,
  read,
  run,
  run_mounted,
  start,
  wait_for,
)
from vlmrlaif_jax.core.errors import EXIT_USER_ERROR
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE


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


@pytest.fixture
def disk(tmp_path):
  """(the folder that a run finds on its disk, the folder where the disk is mounted)."""
  (tmp_path / "mine").mkdir()
  return tmp_path / "mine", tmp_path / "disk"


@pytest.mark.faults
@needs_mount
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_a_full_disk_ends_in_one_line_and_the_next_start_is_equal(
  whole, disk, tmpdir, share
):
  (command, folder), (mine, mounted) = whole, disk
  size = f"size={max(int(measure_kib(folder) * share), 8)}k"
  done = run_mounted(command(mounted / "run"), mine, size, TMPDIR=str(tmpdir))
  check_line(done, EXIT_RESUMABLE, "no space", str(mounted / "run"), "resume")
  check_nothing_left(mine / "run", tmpdir)
  check_whole(run_mounted(command(mounted / "run"), mine, "size=200m"))
  assert read(mine / "run") == read(folder / "run")


@pytest.mark.faults
@needs_mount
@pytest.mark.parametrize("inodes", [4, 20, 60, 90])
def test_a_disk_without_inodes_ends_in_one_line(whole, disk, tmpdir, inodes):
  (command, folder), (mine, mounted) = whole, disk
  size = f"size=200m,nr_inodes={inodes}"
  done = run_mounted(command(mounted / "run"), mine, size, TMPDIR=str(tmpdir))
  check_line(done, EXIT_RESUMABLE, "no inodes", "resume")
  check_nothing_left(mine / "run", tmpdir)
  check_whole(run_mounted(command(mounted / "run"), mine, "size=200m"))
  assert read(mine / "run") == read(folder / "run")


@pytest.mark.faults
@needs_mount
def test_a_full_disk_leaves_no_half_report(whole, disk, tmpdir):
  (command, folder), (mine, mounted) = whole, disk
  shutil.copytree(folder / "run", mounted / "run")
  check_whole(run(command(mounted / "run")))  # Paths of the workdir are of this one.
  shutil.move(mounted / "run", mine / "run")
  (mine / "run" / "report.html").unlink()
  fill = 'dd if=/dev/zero of="$2/fill" bs=4096 2> /dev/null; truncate -s -64k "$2/fill"'
  env = {"TMPDIR": str(tmpdir)}
  done = run_mounted(command(mounted / "run"), mine, "size=50m", fill, **env)
  check_line(done, EXIT_RESUMABLE, "no space", str(mounted / "run" / "report.html"))
  assert not (mine / "run" / "report.html").exists()
  check_nothing_left(mine / "run", tmpdir)
  (mine / "fill").unlink()
  check_whole(run_mounted(command(mounted / "run"), mine, "size=50m"))
  assert (mine / "run" / "report.html").exists()


@pytest.mark.faults
@needs_mount
@pytest.mark.parametrize("stage", ["sft_short", "ppo"])
def test_a_read_only_disk_is_one_line(whole, disk, tmpdir, stage):
  (command, folder), (mine, mounted) = whole, disk
  copy_before(folder, mine / "run", stage)
  prepare = 'mount -o remount,ro "$2"'
  env = {"TMPDIR": str(tmpdir)}
  done = run_mounted(command(mounted / "run"), mine, "size=200m", prepare, **env)
  check_line(done, EXIT_USER_ERROR, "read-only", str(mounted))
  check_nothing_left(mine / "run", tmpdir)


NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
START_PYTHON = (
  "import subprocess, sys; subprocess.check_call([sys.executable, '-c', ''])"
)


def can_be_nobody():
  """Whether root runs this, and other users may start the interpreter."""
  command = [*AS_NOBODY, sys.executable, "-c", START_PYTHON]
  return (
    os.getuid() == 0 and not subprocess.run(command, capture_output=True).returncode
  )


as_root = pytest.mark.skipif(
  not can_be_nobody(), reason="only root can run as another user"
)
HOME = {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}


def open_to_all(tmp_path):
  """Lets other users read the folder, and the model and the videos of all tests."""
  shared = [*tmp_path.parent.glob("shared*"), *tmp_path.parent.glob("shared*/**/*")]
  for path in (*tmp_path.parents[:3], tmp_path, *shared):
    path.chmod(0o755)


def give_away(workdir):
  for path in [workdir, *workdir.rglob("*")]:
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.faults
@as_root
def test_a_workdir_of_another_user_is_one_line(whole, tmp_path):
  command, _ = whole
  (tmp_path / "run").mkdir(mode=0o755)
  open_to_all(tmp_path)
  done = run([*AS_NOBODY, *command(tmp_path / "run")], **HOME)
  check_line(done, EXIT_USER_ERROR, "permission denied", str(tmp_path / "run"))


@pytest.mark.faults
@as_root
def test_a_stage_of_another_user_is_one_line(whole, tmp_path, tmpdir):
  command, folder = whole
  copy_before(folder, tmp_path / "run", "ppo")
  give_away(tmp_path / "run")
  (tmp_path / "run" / "ppo").mkdir(mode=0o755)
  open_to_all(tmp_path)
  done = run([*AS_NOBODY, *command(tmp_path / "run")], **HOME, TMPDIR=str(tmpdir))
  check_line(done, EXIT_USER_ERROR, "permission denied", str(tmp_path / "run" / "ppo"))
  check_nothing_left(tmp_path / "run", tmpdir)
  give_away(tmp_path / "run")
  check_whole(run([*AS_NOBODY, *command(tmp_path / "run")], **HOME))
  assert read(tmp_path / "run") == read(folder / "run")


@pytest.mark.faults
@as_root
def test_a_stage_that_becomes_read_only_is_one_line(whole, tmp_path, tmpdir):
  command, folder = whole
  workdir, log = tmp_path / "run", tmp_path / "log"
  copy_before(folder, workdir, "ppo")
  give_away(workdir)
  open_to_all(tmp_path)
  command = [*AS_NOBODY, *command(workdir)]
  process = start(command, log, **HOME, TMPDIR=str(tmpdir))
  wait_for((workdir / "ppo" / "metrics.jsonl").exists, process, log)
  for path in (workdir / "ppo", *(workdir / "ppo").iterdir()):
    path.chmod(0o555)
  code, said = process.wait(LIMIT_S), log.read_text()
  assert code == EXIT_USER_ERROR and "Traceback" not in said, said[-3000:]
  assert "error: permission denied" in said and str(workdir / "ppo") in said
  for path in (workdir / "ppo", *(workdir / "ppo").iterdir()):
    path.chmod(0o755)
  check_nothing_left(workdir, tmpdir)
  check_whole(run(command, **HOME))
  assert read(workdir) == read(folder / "run")
