"""Errors of the machine: the line that a user sees, and the exit code."""

import errno
import logging
import os
import pathlib

import pytest

from vlmrlaif_jax.core import files, jsonl
from vlmrlaif_jax.core.errors import EXIT_USER_ERROR, ResumableError, UserError
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.recipes.machine_faults import (
  describe_failure,
  describe_thread_failure,
  is_no_fault,
)

FULL = pathlib.Path("/dev/full")  # Every write fails for lack of space.
TENSORSTORE = (
  'RESOURCE_EXHAUSTED: Error writing "opt_state.1.2.count/0" in OCDBT database at '
  'local file "{root}/ppo/checkpoints/2.orbax-checkpoint-tmp/": Failed writing: '
  "No space left on device [OS error 28: ENOSPC No space left on device]"
)


@pytest.mark.parametrize(
  "number, code",
  [
    (errno.ENOSPC, EXIT_RESUMABLE),
    (errno.EDQUOT, EXIT_RESUMABLE),
    (errno.EIO, EXIT_RESUMABLE),
    (errno.ESTALE, EXIT_RESUMABLE),
    (errno.EMFILE, EXIT_RESUMABLE),
    (errno.EROFS, EXIT_USER_ERROR),
    (errno.EACCES, EXIT_USER_ERROR),
    (errno.ENAMETOOLONG, EXIT_USER_ERROR),
    (errno.EEXIST, EXIT_USER_ERROR),
    (errno.ENOTDIR, EXIT_USER_ERROR),
  ],
)
def test_a_fault_is_one_line_with_its_path(tmp_path, number, code):
  path = tmp_path / "ppo" / "metrics.jsonl"
  line, got = describe_failure(
    OSError(number, os.strerror(number), str(path)), tmp_path
  )
  assert got == code and str(path) in line and "\n" not in line
  assert "are intact" in line


def test_the_cause_of_an_error_counts(tmp_path):
  try:
    try:
      raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/x")
    finally:
      raise ImportError("sys.meta_path is None, Python is likely shutting down")
  except ImportError as error:
    line, code = describe_failure(error, tmp_path)
  assert "no space" in line and f"{tmp_path}/x" in line and code == EXIT_RESUMABLE


def test_an_error_of_orbax_is_read(tmp_path):
  error = ValueError(TENSORSTORE.format(root=tmp_path))
  line, code = describe_failure(ExceptionGroup("many", [error]), tmp_path)
  assert code == EXIT_RESUMABLE and f"{tmp_path}/ppo/checkpoints/2" in line
  assert "OCDBT" not in line


def test_users_errors_have_their_codes(tmp_path):
  assert describe_failure(UserError("wrong"), tmp_path) == ("wrong", EXIT_USER_ERROR)
  error = ResumableError("again")
  assert describe_failure(error, tmp_path) == ("again", EXIT_RESUMABLE)


@pytest.mark.parametrize(
  "error", [ValueError("shapes differ"), FileNotFoundError(errno.ENOENT, "no", "x")]
)
def test_other_errors_keep_their_traceback(tmp_path, error):
  assert describe_failure(error, tmp_path) is None
  assert describe_thread_failure(error) is None


def test_a_write_without_space_names_its_file(tmp_path, monkeypatch):
  path = tmp_path / "rates.json"
  fill = lambda path, mode="r", **more: (
    open(FULL, "wb") if mode == "xb" else open(path, mode, **more)
  )
  monkeypatch.setattr(files, "open", fill, raising=False)
  for write in (
    lambda: write_json(path, {}),
    lambda: jsonl.write_records(path, [{}]),
  ):
    with pytest.raises(OSError, match="No space") as failed:
      write()
    line, code = describe_failure(failed.value, tmp_path)
    assert code == EXIT_RESUMABLE and str(path) in line
  assert list(tmp_path.iterdir()) == []


def test_metrics_without_space_end_the_stage_with_their_path(tmp_path):
  with pytest.raises(OSError, match="No space") as failed:
    with StageLog(tmp_path, "sft", 1) as log:
      log._metrics = FULL.open("w")
      log.log_metrics(1, {"loss": 1.0})
  line, code = describe_failure(failed.value, tmp_path)
  assert code == EXIT_RESUMABLE and str(tmp_path / "metrics.jsonl") in line


def test_a_path_that_is_too_long_is_named(tmp_path):
  root = tmp_path / ("x" * 300)
  with pytest.raises(OSError, match="too long") as failed:
    root.mkdir()
  line, code = describe_failure(failed.value, root)
  assert str(root) in line and code == EXIT_USER_ERROR


def test_logs_of_a_fault_are_left_out_and_others_stay():
  def record(error):
    info = error and (type(error), error, None)
    return logging.LogRecord("absl", logging.ERROR, "", 1, "failed", (), info)

  assert not is_no_fault(record(OSError(errno.ENOSPC, "No space left on device")))
  assert is_no_fault(record(ValueError("shapes differ"))) and is_no_fault(record(None))
