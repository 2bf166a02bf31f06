"""Faults that the tests try, with what a user sees. docs/reliability.md lists them."""

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

Damage = Callable[[pathlib.Path], None]


class Damaged(NamedTuple):
  """A damaged file of a workdir whose run is finished, and the next start."""

  fault: str
  file: str  # Path in the workdir.
  damage: Damage
  seen: str  # Part of a printed line, "" for none.
  recovered: str
  code: int = 0  # Exit code of the next start.
  changed: tuple[str, ...] = ()  # Files that then differ from those of the first run.


class Tried(NamedTuple):
  """A fault with a test of its own."""

  fault: str
  seen: str
  recovered: str
  test: str  # FILE::NAME, from tests/.


def write(content: bytes) -> Damage:
  return lambda path: path.write_bytes(content) and None


def cut(path: pathlib.Path) -> None:
  """Removes the second half."""
  os.truncate(path, path.stat().st_size // 2)


def flip(path: pathlib.Path, at: float = 0.5) -> None:
  """Changes a letter in the middle to another one."""
  content = bytearray(path.read_bytes())
  place = int(len(content) * at)
  while not content[place : place + 1].isalnum():
    place += 1
  content[place] = ord("7") if content[place] != ord("7") else ord("3")
  path.write_bytes(content)


def insert(line: bytes, after: int = 1) -> Damage:
  def damage(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:after], line + b"\n", *lines[after:]]))

  return damage


def replace_line(number: int, line: bytes) -> Damage:
  def damage(path):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line + b"\n"
    path.write_bytes(b"".join(lines))

  return damage


def remove(path: pathlib.Path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def unfinish(then: Damage) -> Damage:
  """Also removes the stage's done.json, so that the stage resumes."""

  def damage(path):
    stage = next(p for p in path.parents if (p / "stage.json").exists())
    (stage / "done.json").unlink()
    then(path)

  return damage


def damage_biggest(change: Damage) -> Damage:
  """Damages the largest file in a folder."""

  def damage(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    change(max(files, key=lambda p: p.stat().st_size))

  return damage


def remove_data(folder: pathlib.Path) -> None:
  """Removes the files of arrays in a checkpoint."""
  for path in [*folder.rglob("d")]:
    shutil.rmtree(path)


NOTHING = "nothing is lost"
AGAIN = "the stage runs again from what it has saved; results are equal"
STEP = "the step is set aside; the stage trains again from the step before"
LINE = "the line is left out of the log and the report; results are equal"
REFUSED = "the run ends; the message has the remedy"

WORKDIR = (
  Damaged("done.json is cut", "rm/done.json", cut, "rm/done.json is damaged", AGAIN),
  Damaged(
    "done.json is empty", "ppo/done.json", write(b""), "done.json is damaged", AGAIN
  ),
  Damaged(
    "done.json is no object",
    "rm/done.json",
    write(b"[1]"),
    "done.json is damaged",
    AGAIN,
  ),
  Damaged("done.json is missing", "sft_long/done.json", remove, "", AGAIN),
  Damaged(
    "done.json of the evaluation is missing", "eval/done.json", remove, "", AGAIN
  ),
  Damaged(
    "preferences.jsonl is cut",
    "label/preferences.jsonl",
    cut,
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "a byte of preferences.jsonl differs",
    "label/preferences.jsonl",
    flip,
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "preferences.jsonl is empty",
    "label/preferences.jsonl",
    write(b""),
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "preferences.jsonl is missing",
    "label/preferences.jsonl",
    remove,
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "rates.json is not JSON",
    "label/rates.json",
    write(b"{x"),
    "rates.json is not",
    AGAIN,
  ),
  Damaged(
    "results.json is empty",
    "eval/results.json",
    write(b""),
    "results.json is not",
    AGAIN,
  ),
  Damaged(
    "results.json is missing", "eval/results.json", remove, "results.json is not", AGAIN
  ),
  Damaged(
    "results.json has another type",
    "eval/results.json",
    write(b'{"held_out": 3}'),
    "results.json is not what eval wrote",
    AGAIN,
  ),
  Damaged(
    "answers.jsonl has a damaged line",
    "eval/answers.jsonl",
    replace_line(1, b"\xff{"),
    "answers.jsonl is not what eval wrote",
    AGAIN,
  ),
  Damaged(
    "metrics.jsonl of a finished stage has a line of NUL bytes",
    "rm/metrics.jsonl",
    insert(b"\0" * 40),
    "metrics.jsonl: line 2 is damaged",
    LINE,
    changed=("rm/metrics.jsonl",),
  ),
  Damaged(
    "metrics.jsonl of a finished stage is not UTF-8",
    "rm/metrics.jsonl",
    insert(b'{"step": "\xff"}'),
    "invalid UTF-8",
    LINE,
    changed=("rm/metrics.jsonl",),
  ),
  Damaged(
    "metrics.jsonl of a stage that resumes has a damaged line",
    "ppo/metrics.jsonl",
    unfinish(insert(b'{"step": 1, "lo')),
    "metrics.jsonl: line 2 is damaged",
    LINE,
  ),
  Damaged(
    "metrics.jsonl of a stage that resumes ends in NUL bytes",
    "ppo/metrics.jsonl",
    unfinish(lambda path: path.write_bytes(path.read_bytes() + b"\0" * 99) and None),
    "",
    NOTHING,
  ),
  Damaged(
    "metrics.jsonl of a stage that resumes has a line without a step",
    "ppo/metrics.jsonl",
    unfinish(insert(b'{"loss": 1.0}')),
    "",
    LINE,
  ),
  Damaged(
    "metrics.jsonl of a finished stage is missing",
    "sft_long/metrics.jsonl",
    remove,
    "",
    "the report has no curves of the stage; results are equal",
    changed=("sft_long/metrics.jsonl",),
  ),
  Damaged(
    "samples have a foreign file name",
    "ppo/samples",
    unfinish(lambda path: (path / "step_x.jsonl").write_text("{}") and None),
    "",
    NOTHING,
    changed=("ppo/samples/step_x.jsonl",),
  ),
  Damaged(
    "a file of samples is no text",
    "ppo/samples/step_2.jsonl",
    write(b"\xd8\xff\0\n" * 9),
    "step_2.jsonl: line 1",
    "the report leaves the lines out",
    changed=("ppo/samples/step_2.jsonl",),
  ),
  Damaged(
    "stage.json is not JSON",
    "rm/stage.json",
    write(b"{"),
    "stage.json is not JSON",
    "the report shows the name of the folder",
    changed=("rm/stage.json",),
  ),
  Damaged(
    "checkpoints.json is not JSON",
    "checkpoints.json",
    write(b"{"),
    "checkpoints.json is not JSON",
    "the report leaves it out",
    changed=("checkpoints.json",),
  ),
  Damaged(
    "the largest file of a checkpoint is cut",
    "ppo/checkpoints/3",
    unfinish(damage_biggest(cut)),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "the largest file of a checkpoint is empty",
    "ppo/checkpoints/3",
    unfinish(damage_biggest(write(b""))),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "the arrays of a checkpoint are missing",
    "ppo/checkpoints/3",
    unfinish(remove_data),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "the parameters of a checkpoint are missing",
    "ppo/checkpoints/3/params",
    unfinish(remove),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "config.json is cut", "config.json", cut, "config.json is not JSON", REFUSED, 2
  ),
  Damaged(
    "config.json is empty",
    "config.json",
    write(b""),
    "config.json is not JSON",
    REFUSED,
    2,
  ),
  Damaged(
    "config.json is binary",
    "config.json",
    write(b"\xd8\xff\0"),
    "config.json is not JSON",
    REFUSED,
    2,
  ),
  Damaged(
    "config.json is a list",
    "config.json",
    write(b"[1]"),
    "config.json is damaged",
    REFUSED,
    2,
  ),
  Damaged("config.json is missing", "config.json", remove, "", NOTHING),
  Damaged(
    "data.json is not JSON",
    "data.json",
    write(b"{"),
    "data.json is not JSON",
    REFUSED,
    2,
  ),
)

LOCK = "recipes/test_workdir_lock.py::"
MACHINE = "recipes/test_machine_faults.py::"
FILES = "faults/test_units.py::"
LAUNCHER = "faults/test_launcher.py::"
OTHERS = (
  Tried(
    "a second run starts in a workdir",
    "code 2: the host, process and start of the first run",
    "nothing is written; config.json stays as it is",
    f"{LOCK}test_a_refused_run_leaves_the_config_as_it_is",
  ),
  Tried(
    "kill -9, then a start",
    "the process that ended without releasing the workdir",
    "the run resumes",
    f"{LOCK}test_kill_9_frees_the_workdir",
  ),
  Tried(
    "a host disappears, then a start on another host",
    "a wait of up to 60 s for a heartbeat, then the takeover",
    "the run resumes",
    f"{LOCK}test_a_host_that_gives_no_more_signs_is_waited_for_and_taken_over",
  ),
  Tried(
    "a file system without flock",
    "code 2 while the first run lives",
    "the heartbeat and the process decide",
    f"{LOCK}test_without_flock_a_living_process_is_refused_and_a_dead_one_is_not",
  ),
  Tried(
    "the workdir has a pattern character in its path, or is not UTF-8",
    "code 2: the character and the remedy",
    "nothing is written",
    f"{LOCK}test_a_path_that_checkpoints_cannot_have_is_refused",
  ),
  Tried(
    "rm -rf of the workdir during the evaluation",
    "code 2: the workdir was removed during the run",
    "no stage counts as done, and no report is written",
    "faults/test_workdir.py::test_a_removed_workdir_ends_the_run_without_results",
  ),
  Tried(
    "no space while a JSON file is written",
    "code 75: the path, and how to free space",
    "the old file stays; the same command resumes",
    f"{MACHINE}test_a_write_without_space_names_its_file",
  ),
  Tried(
    "no space while metrics are written",
    "code 75: the path, and how to free space",
    "the same command resumes",
    f"{MACHINE}test_metrics_without_space_end_the_stage_with_their_path",
  ),
  Tried(
    "no space while a checkpoint is written",
    "code 75: the path, and how to free space",
    "the step before is intact; the same command resumes",
    f"{LAUNCHER}test_a_full_disk_ends_in_one_line_and_the_next_start_is_equal",
  ),
  Tried(
    "quota, input/output error, stale file handle, too many open files",
    "code 75: the path and the remedy",
    "the same command resumes",
    f"{MACHINE}test_a_fault_is_one_line_with_its_path",
  ),
  Tried(
    "a read-only disk, another owner, a path that is too long",
    "code 2: the path and the remedy",
    "the run resumes after the remedy",
    f"{LAUNCHER}test_a_workdir_that_cannot_be_written_is_one_line",
  ),
  Tried(
    "the workdir is a file or a dangling link",
    "code 2: the path and the remedy",
    "nothing is written",
    f"{LAUNCHER}test_a_workdir_that_cannot_be_written_is_one_line",
  ),
  Tried(
    "a block of labels is cut, empty or changed, or lacks a key",
    "the file and the line",
    "only this block is labeled again; results are equal",
    f"{FILES}test_only_the_damaged_block_is_labeled_again",
  ),
  Tried(
    "a caption is changed, unreadable, or lacks a key",
    "the file and the line",
    "only its clip is captioned again; results are equal",
    f"{FILES}test_only_the_damaged_caption_is_written_again",
  ),
  Tried(
    "a cached answer or judgment is changed or unreadable",
    "the file and the line",
    "the rows from the damaged one are computed again",
    f"{FILES}test_cached_rows_are_computed_again_from_the_damaged_one",
  ),
  Tried(
    "features are cut, empty or one byte short",
    "the file and the reason",
    "the video is encoded again",
    f"{FILES}test_features_of_another_length_are_encoded_again",
  ),
  Tried(
    "a byte of features differs",
    "code 75: the file",
    "the file is removed; the same command encodes the video again",
    f"{FILES}test_changed_features_are_found_when_they_are_read",
  ),
  Tried(
    "a video of the embedded world is missing, cut, empty or changed",
    "the file",
    "only this video is rendered again; the bytes are equal",
    f"{FILES}test_a_damaged_file_of_the_world_is_written_again",
  ),
  Tried(
    "records of the embedded world are cut, empty or changed",
    "the file",
    "the file is written again; the bytes are equal",
    f"{FILES}test_a_damaged_file_of_the_world_is_written_again",
  ),
  Tried(
    "the data set of the embedded world is damaged",
    "the folder",
    "the world is rendered again; the bytes are equal",
    f"{FILES}test_a_damaged_data_set_of_the_world_is_rendered_again",
  ),
  Tried(
    "a run is killed at any moment",
    "nothing",
    "the next start ends equal to a run that was left alone",
    "end_to_end/test_resume.py::test_params_are_bitwise_those_of_a_run_left_alone",
  ),
)
