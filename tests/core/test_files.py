"""Files that are replaced whole or not at all, and JSON objects read from them."""

import pytest

from vlmrlaif_jax.core.files import (
  find_differences,
  flatten_settings,
  open_replacing,
  read_json,
  replace_text,
)


def test_replaced_file_is_whole_and_alone(tmp_path):
  path = tmp_path / "a.json"
  for text in ("{}", '{"wörd": 1}'):
    replace_text(path, text)
    assert path.read_text(encoding="utf-8") == text
  assert list(tmp_path.iterdir()) == [path]
  assert read_json(path) == {"wörd": 1}


def test_interrupted_writer_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  path.write_bytes(b"old")
  with pytest.raises(KeyboardInterrupt), open_replacing(path) as file:
    file.write(b"half of the")
    raise KeyboardInterrupt
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
  path = tmp_path / "a"
  with open_replacing(path) as first, open_replacing(path) as second:
    first.write(b"first, longer")
    second.write(b"second")
  assert path.read_bytes() == b"first, longer"


def test_json_that_cannot_be_read_is_an_error_with_its_name(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"a\.json"):
    read_json(tmp_path / "a.json")
  (tmp_path / "a.json").write_text("{")
  with pytest.raises(ValueError, match=r"a\.json"):
    read_json(tmp_path / "a.json")


def test_read_json_returns_the_default_only_without_a_file(tmp_path):
  assert read_json(tmp_path / "a.json", default={}) == {}
  (tmp_path / "a.json").write_text("{")
  with pytest.raises(ValueError, match=r"a\.json"):
    read_json(tmp_path / "a.json", default={})


def test_settings_that_differ_have_dotted_names():
  first, second = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
  assert flatten_settings(first) == {"a.b": 1, "a.c": 2}
  assert find_differences(first, second) == {"a.c": [2, 3], "d": [None, 4]}
  assert find_differences(first, first) == {}
