"""Faults with a test of their own, by section. docs/reliability.md lists them."""

from tests.faults.catalog import Tried
from tests.faults.tried_servers import SERVERS_AND_NUMBERS

LOCK = "recipes/test_workdir_lock.py::"
MACHINE = "recipes/test_machine_faults.py::"
FILES = "faults/test_units.py::"
LAUNCHER = "faults/test_launcher.py::"
WORKDIRS_AND_FILES = (
  Tried(
    "a second run starts in a workdir",
    "code 2: the host, process and start of the first run",
    "nothing is written; config.json stays as it is",
    f"{LOCK}test_a_refused_run_leaves_the_config_and_notes_of_errors_as_they_are",
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

OTHERS = (*WORKDIRS_AND_FILES, *SERVERS_AND_NUMBERS)
