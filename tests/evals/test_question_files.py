"""Rows of the files that sources publish: formats, empty cells, bad rows."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals.benchmarks.protocol import Source, find_answers_file
from vlmrlaif_jax.evals.question_files import (
  get_video_names,
  load_items,
  read_question_rows,
)

SOURCE = Source("Bench", "https://example.org", "  a list of things")
ROWS = [{"id": 1, "question": "Who?"}, {"id": 2, "question": "Why, and\nwhen?"}]


def write(path, rows):
  if path.suffix == ".json":
    path.write_text(json.dumps(rows))
  elif path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif path.suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    mark = "\t" if path.stem == "tabs" else ","
    cells = [list(rows[0]), *(row.values() for row in rows)]
    quoted = [mark.join(f'"{x}"' for x in row) for row in cells]
    path.write_text("\n".join(quoted) + "\n", encoding="utf-8-sig")
  return path


def load(path, problems=None, **more):
  return load_items(path, SOURCE, lambda _, row: row, problems, **more)


@pytest.mark.parametrize(
  "name", ["a.json", "a.jsonl", "a.parquet", "a.csv", "a.tsv", "tabs.csv"]
)
def test_every_format_is_read(tmp_path, name):
  found = load(write(tmp_path / name, ROWS))
  assert [(int(row["id"]), row["question"]) for row in found] == [
    (1, "Who?"),
    (2, "Why, and\nwhen?"),
  ]


def test_empty_cells_are_no_text(tmp_path):
  path = tmp_path / "a.json"
  path.write_text('[{"a": NaN, "b": null, "c": " ", "d": 0, "e": [], "f": false}]')
  assert load(path) == [{"d": 0, "e": [], "f": False}]
  table = write(tmp_path / "a.parquet", [{"a": float("nan"), "b": None, "c": "x"}])
  assert load(table) == [{"c": "x"}]


@pytest.mark.parametrize(
  ("content", "rows"),
  [
    ({"data": [{"a": 1}]}, [{"a": 1}]),
    ({"v1": {"a": 1}, "v2": {"a": 2}}, [{"video_id": "v1", "a": 1},
                                        {"video_id": "v2", "a": 2}]),
    # Perception Test and TempCompass: a list of questions of each video.
    (
      {"v1": {"meta": {"x": 1}, "mc": [{"question": "A?"}, {"question": "B?"}]}},
      [{"video_id": "v1", "meta": {"x": 1}, "dim": "mc", "question": q}
       for q in ("A?", "B?")],
    ),
    ([{"v": 1, "questions": [{"question": "A?", "v": 2}]}],
     [{"v": 2, "dim": "questions", "question": "A?"}]),
  ],
)  # fmt: skip
def test_nested_questions_are_rows(tmp_path, content, rows):
  assert load(write(tmp_path / "a.json", content)) == rows


def test_a_bad_row_is_left_out_and_named_with_its_file_and_place(tmp_path):
  rows = [{"Q": 1, "n": 1}, {"A": 1}, ["x"], "text", {"Q": 1, "n": 2}, {"Q": 1, "n": 1}]

  def make(number, row):
    if row["n"] == 2:
      raise ValueError("it is odd")
    return row

  problems = []
  path = write(tmp_path / "a.json", rows)
  found = load_items(path, SOURCE, make, problems, keys=("Q",), once=("n",))
  assert found == [{"Q": 1, "n": 1}]
  assert problems == [
    SkippedRecord("record 2", "it has no ['Q']", "a.json"),
    SkippedRecord("record 3", "it is not an object", "a.json"),
    SkippedRecord("record 4", "it is not an object", "a.json"),
    SkippedRecord("record 5", "it is odd", "a.json"),
    SkippedRecord("record 6", "n 1 is there twice", "a.json"),
  ]


def test_a_broken_line_is_left_out(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"Q": 1}\n{"Q": \n{"Q": 2}\n')
  problems = []
  assert load(path, problems) == [{"Q": 1}, {"Q": 2}]
  [(place, reason, file)] = problems
  assert (place, file) == ("line 2", "a.jsonl") and "invalid JSON" in reason


def test_a_line_of_too_many_cells_is_left_out(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("id,question\n1,Who?\n2,Who, and why?\n")
  problems = []
  assert load(path, problems) == [{"id": "1", "question": "Who?"}]
  assert problems[0][::2] == ("line 3", "a.csv") and "more cells" in problems[0].reason


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("a.json", None, "no file at"),
    ("a.json", b"[", "is not JSON"),
    ("a.json", b"\xff\xfe", "is not JSON"),
    ("a.json", b"3", "must contain a list of records"),
    ("a.json", b'{"a": 1}', "must contain a list of records"),
    ("a.json", b"[]", "has no record"),
    ("a.json", b'[{"A": 1}]', r"has no usable record.*record 1: it has no \['Q'\]"),
    ("a.csv", b"", "has no record"),
    ("a.parquet", b"PAR1", "is not PARQUET"),
    ("a.xlsx", b"", "must end in one of .json .jsonl .csv .tsv .parquet"),
  ],
)
def test_a_file_of_no_use_says_where_it_comes_from(tmp_path, name, content, said):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises((FileNotFoundError, ValueError), match=f"(?s){said}") as caught:
    load(path, keys=("Q",))
  assert "Bench comes from https://example.org" in str(caught.value)
  assert "a list of things" in str(caught.value)


def test_places_count_from_one(tmp_path):
  path = write(tmp_path / "a.parquet", ROWS)
  assert [place for place, _ in read_question_rows(path, SOURCE)] == ["row 1", "row 2"]


@pytest.mark.parametrize(
  ("row", "names"),
  [
    ({"video_id": 7010}, ("7010", "video7010", "vid7010")),
    ({"video_id": 1301.0}, ("1301", "video1301", "vid1301")),
    ({"video_id": "001", "videoID": "fFjv93ACGo8"}, ("fFjv93ACGo8",)),
    ({"gif_name": "tumblr_n", "vid_id": "ACTION4"}, ("tumblr_n",)),
    ({"video_id": "a", "video_path": "a.mp4"}, ("a.mp4",)),
  ],
)
def test_the_field_with_the_name_of_the_file_counts(row, names):
  assert get_video_names(row) == names


@pytest.mark.parametrize(
  ("questions", "answers"),
  [("test_q.json", "test_a.json"), ("questions.json", "subset_answers.json")],
)
def test_answers_lie_next_to_their_questions(tmp_path, questions, answers):
  assert find_answers_file(tmp_path / questions) is None
  (tmp_path / answers).touch()
  assert find_answers_file(tmp_path / questions) == tmp_path / answers
  assert find_answers_file(tmp_path / "other.json") is None
