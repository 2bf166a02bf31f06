"""Tests that need compilers: deselected without them, an error in CI."""

import pytest

from tests.helpers import compilers

ABSENT = "surely-not-installed"


class Item:
  """As much of pytest's as `split` reads."""

  def __init__(self, *markers):
    self.markers = markers

  def get_closest_marker(self, name):
    return name if name in self.markers else None


def test_missing_names_what_is_not_installed():
  assert compilers.missing(["pytest", ABSENT]) == [ABSENT]


def test_only_marked_tests_are_deselected():
  plain, marked = Item(), Item("compilers")
  assert compilers.split([plain, marked], [ABSENT]) == ([plain], [marked])


def test_nothing_is_deselected_where_all_is_installed():
  items = [Item(), Item("compilers")]
  assert compilers.split(items, []) == (items, [])


def test_ci_without_compilers_is_an_error():
  with pytest.raises(pytest.UsageError, match=ABSENT):
    compilers.check([ABSENT], {"CI": "true"})


@pytest.mark.parametrize(
  ("absent", "environ"), [([], {"CI": "true"}), ([ABSENT], {}), ([ABSENT], {"CI": ""})]
)
def test_elsewhere_it_is_not(absent, environ):
  compilers.check(absent, environ)
