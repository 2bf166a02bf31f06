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

LIMITS = "faults/test_limits.py::"
SIGNALS = "faults/test_signals.py::"
POOL = "data/test_worker_pool.py::"
MEMORY = "recipes/test_memory_faults.py::"
EQUAL = "the next start ends equal to a run that was left alone"
DISKS_AND_LIMITS = (
  Tried(
    "no inodes are left",
    "code 75: the path, and how to free inodes",
    EQUAL,
    f"{LAUNCHER}test_a_disk_without_inodes_ends_in_one_line",
  ),
  Tried(
    "the disk is full while report.html is written",
    "code 75: report.html, and how to free space",
    "no half page and no other file stays; the next start writes the page",
    f"{LAUNCHER}test_a_full_disk_leaves_no_half_report",
  ),
  Tried(
    "the disk is read-only, before the first stage or before PPO",
    "code 2: the path and the remedy",
    "nothing is written",
    f"{LAUNCHER}test_a_read_only_disk_is_one_line",
  ),
  Tried(
    "the workdir is of another user",
    "code 2: the path and the remedy",
    "nothing is written",
    f"{LAUNCHER}test_a_workdir_of_another_user_is_one_line",
  ),
  Tried(
    "the folder of a stage is of another user",
    "code 2: the path and the remedy",
    EQUAL,
    f"{LAUNCHER}test_a_stage_of_another_user_is_one_line",
  ),
  Tried(
    "the folder of a stage becomes read-only while it trains",
    "code 2: the path and the remedy",
    EQUAL,
    f"{LAUNCHER}test_a_stage_that_becomes_read_only_is_one_line",
  ),
  Tried(
    "few files may be open (ulimit -n)",
    "code 75: the path and the limit",
    EQUAL,
    f"{LIMITS}test_a_limit_ends_in_one_line_and_the_next_start_is_equal",
  ),
  Tried(
    "files may not be large (ulimit -f), at a checkpoint or the report",
    "code 75: the path and the limit",
    EQUAL,
    f"{LIMITS}test_a_limit_ends_in_one_line_and_the_next_start_is_equal",
  ),
  Tried(
    "the cache of compiled programs is read-only",
    "one warning",
    "the run continues; results are equal",
    f"{LIMITS}test_a_cache_that_cannot_be_written_is_one_warning",
  ),
  Tried(
    "the cache of compiled programs is full",
    "one warning",
    "the run continues; results are equal",
    f"{LIMITS}test_a_cache_that_cannot_be_written_is_one_warning",
  ),
  Tried(
    "nothing is writable but the workdir",
    "a line: compiled programs are not cached",
    "the run continues; results are equal",
    f"{LIMITS}test_nothing_but_the_workdir_is_writable",
  ),
  Tried(
    "TMPDIR does not exist",
    "nothing",
    "the run continues; results are equal",
    f"{LIMITS}test_a_folder_of_temporary_files_that_is_missing_is_not_needed",
  ),
  Tried(
    "an answer of the storage arrives after a save has failed",
    "nothing but the error of the save",
    "no unfinished step stays",
    "launch/test_failures.py::"
    "test_a_late_callback_prints_nothing_and_other_errors_are_printed",
  ),
)
SIGNAL = f"{SIGNALS}test_a_signal_ends_the_run_and_the_next_start_is_equal"
TOLD = "code 75 within a minute: the signal, and that the same command resumes"
PROCESSES = (
  Tried("SIGTERM or SIGINT while videos are decoded", TOLD, EQUAL, SIGNAL),
  Tried("SIGTERM or SIGINT while a program is compiled", TOLD, EQUAL, SIGNAL),
  Tried("SIGTERM or SIGINT in the reward model", TOLD, EQUAL, SIGNAL),
  Tried("SIGTERM or SIGINT in PPO", TOLD, EQUAL, SIGNAL),
  Tried("SIGTERM or SIGINT in the evaluation", TOLD, EQUAL, SIGNAL),
  Tried(
    "SIGTERM while labels are written",
    TOLD,
    "written blocks stay as they are; the preferences are equal",
    f"{SIGNALS}test_a_signal_between_blocks_of_labels_loses_no_block",
  ),
  Tried(
    "SIGTERM while the report is written",
    "code 0",
    "the report is whole",
    f"{SIGNALS}test_a_signal_after_the_last_stage_lets_the_report_be_written",
  ),
  Tried(
    "a second SIGINT while a program is compiled",
    "code 130 within 10 s, or 75 if the step ends first",
    EQUAL,
    f"{SIGNALS}test_a_second_signal_ends_a_compilation_and_the_next_start_is_equal",
  ),
  Tried(
    "a run is stopped (SIGSTOP) and continues; a second start meanwhile",
    "code 2 of the second start: the process that holds the workdir",
    "results are equal",
    f"{SIGNALS}test_a_stopped_run_continues_and_its_results_are_equal",
  ),
  Tried(
    "a run is stopped so long that another host takes over, and continues",
    "code 2: the host and process that have taken over",
    "it ends before it writes; the other run is untouched",
    "recipes/test_takeover.py::"
    "test_a_stopped_run_that_was_taken_over_ends_without_writing",
  ),
  Tried(
    "one of two processes is killed at a random time",
    "code 75 of the other one within 90 s: the lost process",
    "the next start of both ends equal to two that were left alone",
    f"{SIGNALS}test_a_process_of_two_that_is_killed_ends_the_other_one",
  ),
  Tried(
    "the launcher of one of four processes is killed, in SFT",
    "code 75 of the others within a minute: the lost process",
    "two processes on another mesh resume",
    "end_to_end/test_hosts.py::test_the_others_end_within_a_minute_and_are_resumable",
  ),
  Tried(
    "a note of an error of an earlier start is in the workdir",
    "nothing",
    "it is no reason of a later end; the holder of the workdir removes it",
    "launch/test_supervisor.py::test_error_of_an_earlier_start_counts_no_more",
  ),
  Tried(
    "a decode worker is killed",
    "nothing",
    "another worker decodes its video",
    f"{POOL}test_the_request_of_a_killed_worker_is_answered_by_another_one",
  ),
  Tried(
    "a video kills each decode worker",
    "the video among those left out, with the signal",
    "the other videos are decoded",
    f"{POOL}test_worker_that_dies_in_the_middle_of_a_reply_fails_that_request_alone",
  ),
  Tried(
    "a decode worker is stopped (SIGSTOP)",
    "the video among those left out, with the time limit",
    "the worker is replaced; the other videos are decoded",
    f"{POOL}test_a_stopped_worker_ends_at_its_deadline_and_the_others_answer",
  ),
)
EXHAUSTED = f"{MEMORY}test_exhausted_memory_names_the_stage_the_use_and_the_remedy"
SETTINGS = (
  "code 2: the stage, step and phase, what holds memory, settings that need less"
)
MEMORY_AND_POLICIES = (
  Tried("XLA cannot allocate an array", SETTINGS, EQUAL, EXHAUSTED),
  Tried("NumPy or Python cannot allocate", SETTINGS, EQUAL, EXHAUSTED),
  Tried("the system cannot map memory (ENOMEM)", SETTINGS, EQUAL, EXHAUSTED),
  Tried(
    "the memory of a device is exhausted",
    "code 2: as above, with the devices",
    "settings that may change in the same workdir come first",
    f"{MEMORY}test_exhausted_memory_of_a_device_names_devices_as_a_remedy",
  ),
  Tried(
    "memory is exhausted outside of stages",
    "code 2: the remedy",
    "what is saved stays",
    f"{MEMORY}test_memory_that_is_exhausted_outside_of_stages_is_one_line",
  ),
  Tried(
    "a policy was trained again after its evaluation",
    "the evaluation runs again",
    "the results are those of the new policy",
    "recipes/test_runner.py::"
    "test_an_evaluation_runs_again_when_a_policy_was_trained_again",
  ),
)

OTHERS = (
  *WORKDIRS_AND_FILES,
  *DISKS_AND_LIMITS,
  *PROCESSES,
  *MEMORY_AND_POLICIES,
  *SERVERS_AND_NUMBERS,
)
