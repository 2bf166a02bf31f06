"""Limits of processes, and folders besides the workdir, in the real program."""

import pytest

from tests.faults.program import (
  ROOT,
  check_line,
  check_nothing_left,
  check_whole,
  copy_before,
  needs_mount,
  read,
  run,
)
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
  "limit, words",
  [
    ("--nofile=30", "too many files are open"),
    ("--fsize=20000", "a file is larger than"),  # Bytes; the same error as of a quota.
    ("--fsize=60000", "report.html"),
  ],
)
def test_a_limit_ends_in_one_line_and_the_next_start_is_equal(
  whole, tmp_path, tmpdir, limit, words
):
  command, folder = whole
  done = run(["prlimit", limit, *command(tmp_path / "run")], TMPDIR=str(tmpdir))
  check_line(done, EXIT_RESUMABLE, words, str(tmp_path / "run"), "resume")
  check_nothing_left(tmp_path / "run", tmpdir)
  check_whole(run(command(tmp_path / "run")))
  assert read(tmp_path / "run") == read(folder / "run")


@needs_mount
@pytest.mark.parametrize("options", ["ro", "size=100k"])
def test_a_cache_that_cannot_be_written_is_one_warning(
  whole, tmp_path, tmpdir, options
):
  command, folder = whole
  cache = tmp_path / "cache"
  cache.mkdir()
  mount = f'mount -t tmpfs -o {options} tmpfs {cache} && cd {ROOT} && exec "$@"'
  copy_before(folder, tmp_path / "run", "ppo")
  done = run(
    ["unshare", "-rm", "bash", "-c", mount, "sh", *command(tmp_path / "run")],
    JAX_COMPILATION_CACHE_DIR=str(cache), TMPDIR=str(tmpdir),
  )  # fmt: skip
  check_whole(done)
  assert done.stderr.count("warning: compiled programs are not cached") == 1
  assert done.stderr.count("Error writing persistent") == 1
  assert read(tmp_path / "run") == read(folder / "run")


@needs_mount
def test_nothing_but_the_workdir_is_writable(whole, tmp_path):
  command, folder = whole
  workdir, copy = tmp_path / "run", tmp_path / "copy"
  workdir.mkdir()
  script = f"""
    mount -t tmpfs tmpfs {workdir} && cd {ROOT} || exit 99
    mount -o remount,bind,ro / && mount -o remount,bind,ro /dev/shm || exit 99
    touch {tmp_path}/x && exit 99
    unset JAX_COMPILATION_CACHE_DIR; "$@"; code=$?
    mount -o remount,bind,rw / && cp -a {workdir} {copy} && exit $code
  """
  done = run(
    ["unshare", "-rm", "bash", "-c", script, "sh", *command(workdir)],
    HOME="/nowhere", TMPDIR="/nowhere", XDG_CACHE_HOME="",
  )  # fmt: skip
  check_whole(done)
  assert done.stdout.count("compiled programs are not cached") == 1
  assert read(copy) == read(folder / "run")


def test_a_folder_of_temporary_files_that_is_missing_is_not_needed(whole, tmp_path):
  command, folder = whole
  check_whole(run(command(tmp_path / "run"), TMPDIR="/nowhere"))
  assert read(tmp_path / "run") == read(folder / "run")
