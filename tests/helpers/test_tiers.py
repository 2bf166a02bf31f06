"""Which tests the fast tier has."""

import pytest

from tests.helpers.tiers import is_fast

LOSS = "tests/losses/test_masked.py::test_x"


def test_a_test_of_a_function_is_fast():
  assert is_fast(LOSS, {"parametrize"}, ["tmp_path"])
  assert is_fast("tests/test_docs.py::test_x", set(), [])


@pytest.mark.parametrize(
  ("nodeid", "markers", "fixtures"),
  [
    ("tests/stages/training/test_rl.py::test_x", set(), []),
    ("tests/end_to_end/test_resume.py::test_x", set(), []),
    (LOSS, {"slow"}, []),
    (LOSS, {"compilers"}, []),
    (LOSS, set(), ["tmp_path", "one"]),
  ],
)
def test_what_runs_stages_or_takes_long_is_not(nodeid, markers, fixtures):
  assert not is_fast(nodeid, markers, fixtures)
