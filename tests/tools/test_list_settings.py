"""The tables of settings in docs/settings.md."""

import pytest

from tools import list_settings
from vlmrlaif_jax.stages.training import grpo


def test_the_page_has_the_tables_of_the_code():
  page = list_settings.PAGE.read_text()
  assert list_settings.insert_tables(page) == page, "run python -m tools.list_settings"


@pytest.mark.parametrize("preset", list_settings.PRESETS)
def test_every_setting_of_a_recipe_has_a_row(preset):
  sections = list_settings.list_sections()
  for key in list_settings.list_values(preset):
    section, _, name = key.partition(".")
    if name and section != "mesh":
      assert name in sections[section].defaults, key


def test_a_row_has_the_default_the_presets_and_the_comment():
  settings = list_settings.read_builder("grpo.", grpo.default_config)
  name, kind, default, tiny, large, allowed, meaning = list_settings.make_row(
    settings, "epochs"
  )
  assert (name, kind, default, tiny, large) == ("`epochs`", "int", "`1`", "", "")
  assert allowed == "1 or more" and "rollout" in meaning


def test_most_settings_have_allowed_values_and_a_meaning():
  rows = [
    row
    for settings in list_settings.list_sections().values()
    for row in list_settings.list_rows(settings)
  ]
  assert sum(bool(row[5]) for row in rows) > len(rows) / 2
  assert sum(bool(row[6]) for row in rows) > 0.7 * len(rows)


@pytest.mark.parametrize(
  ("text", "allowed"),
  [
    ("one of , nf4, int8", '`""`, `nf4`, `int8`'),
    ("some of ('letter', 'text')", "`letter`, `text`"),
    ("one of ['none', 'one']", "`none`, `one`"),
    ("from 0 to below the 40 updates", "from 0 to below the number of updates"),
  ],
)
def test_allowed_values_are_read_from_an_error(text, allowed):
  assert list_settings.format_allowed(text) == allowed


def test_comments_of_a_line_stand_at_its_end_or_above_it():
  source = "a = 1  # One.\n# Two\n# lines.\nb = '# no'\nc = 3\n"
  lines = list_settings.read_comment_lines(source)
  assert [lines[number] for number in (1, 4, 5)] == ["One.", "Two lines.", ""]
