"""The picture of the packages in docs/design.md."""

import pytest

from tools import draw_packages
from tools.draw_packages import TIER


def test_the_page_has_the_picture_that_the_tiers_give():
  page = draw_packages.PAGE.read_text()
  assert draw_packages.insert_block(page, draw_packages.make_block()) == page


def test_every_package_is_drawn_with_its_purpose():
  drawn = draw_packages.make_block()
  for package in TIER:
    assert f"| `{package}/` | {draw_packages.read_purpose(package)} |" in drawn


def test_only_the_block_between_the_markers_is_replaced():
  begin, end = draw_packages.BEGIN, draw_packages.END
  page = f"a\n{begin}old\n{end}b\n"
  assert draw_packages.insert_block(page, "new\n") == f"a\n{begin}new\n{end}b\n"


@pytest.mark.parametrize("page", ["", draw_packages.BEGIN, draw_packages.END])
def test_a_page_without_markers_is_an_error(page):
  with pytest.raises(ValueError, match="packages"):
    draw_packages.insert_block(page, "new")
