"""Which tests the fast tier has."""

import pytest

from tests.helpers import several
from tests.helpers.tiers import STARTERS, is_fast

LOSS = "tests/losses/test_masked.py::test_x"


def test_a_test_of_a_function_is_fast():
  assert is_fast(LOSS, {"parametrize"}, ["tmp_path"])
  assert is_fast("tests/test_docs.py::test_x", set(), [])


@pytest.mark.parametrize(
  ("nodeid", "markers", "fixtures"),
  [
    ("tests/stages/training/test_rl.py::test_x", set(), []),
    ("tests/end_to_end/test_resume.py::test_x", set(), []),
    ("tests/core/test_distributed.py::test_x", set(), []),
    (LOSS, {"slow"}, []),
    (LOSS, {"compilers"}, []),
    (LOSS, {"real_model"}, []),
    (LOSS, set(), ["tmp_path", "one"]),
  ],
)
def test_what_runs_stages_or_takes_long_is_not(nodeid, markers, fixtures):
  assert not is_fast(nodeid, markers, fixtures)


def test_files_that_start_programs_are_there():
  assert [path for path in STARTERS if not (several.ROOT / path).is_file()] == []
