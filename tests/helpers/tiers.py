"""The fast tier: tests of functions and modules, without runs of stages or programs."""

import pytest

WHOLE_PROGRAMS = {  # Folders of tests that run stages, launchers or compilers.
  *("end_to_end", "launch", "perf", "planner", "recipes"),
  *("runtime", "serving", "stages"),
}
STARTERS = {  # Files of tests in other folders that start or run programs.
  "tests/core/test_distributed.py",
  "tests/core/test_interrupts.py",
  "tests/feedback/test_endpoint_server.py",
  "tests/tools/pretraining/test_program.py",
  "tests/tools/test_list_settings.py",
}
SHARED_RUNS = {"one", "ppo_on_one"}  # Fixtures that run stages.


def mark(items: list[pytest.Item]) -> None:
  """Marks the tests of the fast tier `fast`."""
  for item in items:
    if is_fast(item.nodeid, {m.name for m in item.iter_markers()}, item.fixturenames):
      item.add_marker("fast")


def is_fast(nodeid: str, markers: set[str], fixtures: list[str]) -> bool:
  """Whether a test belongs to the fast tier.

  Args:
    nodeid: from the root of the repository, as pytest prints it.
    markers: of the test.
    fixtures: all that the test uses, directly or not.
  """
  return (
    nodeid.split("/")[1] not in WHOLE_PROGRAMS
    and nodeid.split("::")[0] not in STARTERS
    and not markers & {"slow", "compilers", "torchvision", "real_model"}
    and not SHARED_RUNS.intersection(fixtures)
  )
