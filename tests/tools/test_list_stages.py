"""The table of stages in docs/design.md."""

import pytest

from tools import list_stages
from vlmrlaif_jax.stages.stage import get_stage, load_stages


def test_the_page_has_the_table_of_all_declared_stages():
  page = list_stages.PAGE.read_text()
  assert list_stages.insert_table(page) == page


def test_every_stage_has_one_row():
  rows = list_stages.make_table().splitlines()[2:]
  assert sorted(row.split("`")[1] for row in rows) == sorted(load_stages())


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("ppo", "trains a policy"),
    ("rm", "trains"),
    ("label", "labels"),
    ("eval", "measures"),
  ],
)
def test_a_stage_is_of_the_kind_that_its_declaration_gives(name, kind):
  assert list_stages.get_kind(get_stage(name)) == kind
