"""Checks that the snippets of docs/data_formats.md are read as the page states."""

import json
import pathlib
import re

import pytest

from vlmrlaif_jax.data.records import read_preferences, read_records

PAGE = (pathlib.Path(__file__).parents[3] / "docs/data_formats.md").read_text()


def snippets(heading):
  """The JSON of each snippet in a section of the page, as a list of rows."""
  section = PAGE[PAGE.index(f"## {heading}\n") :].split("\n## ")[0]
  found = [json.loads(s) for s in re.findall(r"```json\n(.*?)```", section, re.DOTALL)]
  return [rows if isinstance(rows, list) else [rows] for rows in found]


@pytest.fixture
def write(tmp_path):
  (tmp_path / "frames").mkdir()
  for name in ("clip.mp4", "other.mp4", "frames/1.jpg", "frames/2.jpg"):
    (tmp_path / name).touch()

  def write(rows):
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    return tmp_path / "mine.json"

  return write


@pytest.mark.parametrize("rows", snippets("Records"))
def test_records_of_the_page_are_read(write, rows):
  examples, problems = read_records(write(rows))
  assert problems == [] and len(examples) == len(rows)


@pytest.mark.parametrize("rows", snippets("Preferences"))
def test_preferences_of_the_page_are_read(write, rows):
  pairs, problems = read_preferences(write(rows))
  assert problems == [] and len(pairs) == len(rows)
  for pair in pairs:
    better = pair[f"output_{pair['preference']}"]
    assert better.startswith("A dog") and pair["question"].endswith("?")


@pytest.mark.parametrize("row", [row for rows in snippets("Rejected") for row in rows])
def test_rejected_records_of_the_page_are_skipped(write, row):
  examples, [problem] = read_records(write([row]))
  assert examples == [] and problem.file == "mine.json"


def test_the_page_has_snippets():
  count = {name: len(snippets(name)) for name in ("Records", "Preferences", "Rejected")}
  assert count == {"Records": 9, "Preferences": 7, "Rejected": 1}
