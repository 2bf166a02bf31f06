"""JSON lines that survive a killed writer."""

import pytest

from vlmrlaif_jax.core.jsonl import append_jsonl, read_jsonl, write_records


def test_what_is_written_is_read(tmp_path):
  rows = [{"id": "a", "answer": "Größe\n\u2028 한국 \ud83d"}, {"n": [1, {"m": None}]}]
  write_records(tmp_path / "new" / "rows.jsonl", rows)
  assert read_jsonl(tmp_path / "new" / "rows.jsonl") == rows


def test_write_leaves_the_old_file_when_interrupted(tmp_path):
  path = tmp_path / "rows.jsonl"
  write_records(path, [{"old": 1}])

  def rows():
    yield {"new": 1}
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_records(path, rows())
  assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
  assert read_jsonl(path) == [{"old": 1}]


@pytest.mark.parametrize(
  ("before", "expected"),
  [
    (b"", []),
    (b'{"a": 1}\n', [{"a": 1}]),
    (b'{"a": 1}\n{"a": 22', [{"a": 1}]),  # Torn.
    (b'{"a": 22', []),
    (b'{"a": 1}\n{"a": "\xc3', [{"a": 1}]),  # Torn within a letter.
    (b'{"a": 1}\n{"a": 22}', [{"a": 1}, {"a": 22}]),  # Whole but for its end.
  ],
)
def test_append_goes_on_after_whole_lines(tmp_path, before, expected):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(before)
  assert read_jsonl(path) == expected
  append_jsonl(path, [{"b": 1}])
  append_jsonl(path, [{"b": 2}])
  assert read_jsonl(path) == [*expected, {"b": 1}, {"b": 2}]


def test_append_makes_the_file(tmp_path):
  append_jsonl(tmp_path / "new" / "rows.jsonl", [{"a": 1}])
  assert read_jsonl(tmp_path / "new" / "rows.jsonl") == [{"a": 1}]


def test_read_jsonl_names_the_bad_line(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"a": 1}\n\n{"a" 2}\n{"a": 3}\n')
  with pytest.raises(ValueError, match=r"rows.jsonl, line 3: invalid JSON at column 6"):
    read_jsonl(path)
