"""Files that are replaced whole, and settings that differ."""

import pytest

from vlmrlaif_jax.core.files import (
  differing,
  flatten,
  read_json,
  replacing,
  write_json,
)


def test_write_that_fails_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  write_json(path, {"old": 1})
  with pytest.raises(KeyboardInterrupt), replacing(path) as file:
    file.write(b"{")
    raise KeyboardInterrupt
  assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
  assert read_json(path) == {"old": 1}


def test_read_json_returns_the_default_without_a_file(tmp_path):
  assert read_json(tmp_path / "a.json", default={}) == {}
  with pytest.raises(FileNotFoundError, match=r"a\.json"):
    read_json(tmp_path / "a.json")


def test_read_json_names_a_file_that_is_not_json(tmp_path):
  (tmp_path / "a.json").write_text("{")
  with pytest.raises(ValueError, match=r"a\.json"):
    read_json(tmp_path / "a.json", default={})


def test_settings_that_differ_have_dotted_names():
  first, second = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
  assert flatten(first) == {"a.b": 1, "a.c": 2}
  assert differing(first, second) == {"a.c": [2, 3], "d": [None, 4]}
  assert differing(first, first) == {}
