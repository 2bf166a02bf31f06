"""Texts of data, servers and models cannot control a terminal or end a run."""

import io
import json

import pytest

from vlmrlaif_jax.core.distributed import print_once
from vlmrlaif_jax.core.errors import make_printable
from vlmrlaif_jax.core.jsonl import read_jsonl
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.data.records import read_records
from vlmrlaif_jax.evals.question_files import read_answers

# Clears the screen, writes to the clipboard, overwrites the line; half a character.
HOSTILE = "\x1b[2J \x1b]52;c;cm0=\a \r \x9b1m \ud800"
DEEP, LONG = "[" * 100_000, "1" * 5000


def test_what_a_terminal_obeys_is_escaped():
  assert make_printable(HOSTILE).isprintable()
  assert make_printable("é 猫 \n\t") == "é 猫 \n\t"


def test_notes_and_tables_are_printable(tmp_path, capsys):
  stream = io.StringIO()
  with StageLog(tmp_path, "sft", 1, stream=stream) as log:
    log.print_note(HOSTILE)
    log.print_table("title", [{"name": HOSTILE}])
  print_once(HOSTILE)
  for text in (stream.getvalue(), capsys.readouterr().out):
    assert text.replace("\n", "").isprintable() and r"\x1b[2J" in text


@pytest.mark.parametrize("id", [HOSTILE, "a\nerror: b", "\ud800"])
def test_a_record_with_such_an_id_is_skipped(tmp_path, id):
  (tmp_path / "v.mp4").touch()
  row = {"id": id, "video": "v.mp4", "question": "Why?", "answer": "So."}
  examples, problems = read_records(write(tmp_path, row, {**row, "id": "b"}))
  assert [example["id"] for example in examples] == ["b"]
  assert make_printable(problems[0].id) == problems[0].id


def write(folder, *rows):
  (folder / "set.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return folder / "set.jsonl"


@pytest.mark.parametrize("line", [DEEP, f'{{"id": {LONG}}}'])
def test_a_line_that_python_cannot_read_is_reported(tmp_path, line):
  path = tmp_path / "rows.jsonl"
  path.write_text(f"{line}\n")
  with pytest.raises(ValueError, match="line 1"):
    read_jsonl(path)
  _, [problem] = read_records(path)
  assert problem.reason


@pytest.mark.parametrize("content", [DEEP.encode(), b'{"a": "\xff"}', LONG.encode()])
def test_a_file_of_answers_that_python_cannot_read_is_named(tmp_path, content):
  (tmp_path / "test_q.json").write_text("[]")
  (tmp_path / "test_a.json").write_bytes(content)
  with pytest.raises(ValueError, match="test_a.json"):
    read_answers(tmp_path / "test_q.json")
