"""Rows of JSON, JSON Lines, Parquet and saved data sets; damaged files by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmrlaif_jax.data.formats.row_files import read_file_rows

ROWS = [{"id": str(i), "video": f"{i}.mp4", "text": "什么?"} for i in range(150)]
TEXT = json.dumps(ROWS, ensure_ascii=False)
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write_dataset(folder, rows, **state):
  """Writes a folder as `datasets.Dataset.save_to_disk` does."""
  folder.mkdir(parents=True)
  table = pa.Table.from_pylist(rows)
  files = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
  for name, part in zip(files, (table[:100], table[100:]), strict=True):
    with pa.OSFile(str(folder / name), "wb") as file:
      with pa.ipc.new_stream(file, part.schema) as writer:
        writer.write_table(part)
  state = {"_data_files": [{"filename": name} for name in files], **state}
  (folder / "state.json").write_text(json.dumps(state))


def read(path):
  return [row for _, row in read_file_rows(path)]


@pytest.mark.parametrize(
  ("name", "data"),
  [
    ("a.json", TEXT.encode()),
    ("a.JSON", b"\xef\xbb\xbf" + TEXT.encode()),
    ("a.json", TEXT.encode("utf-16")),
    ("a.json", f'{{"version": 2, "data": {TEXT}}}'.encode()),
    ("a.json", f'{{"type": "x", "instances": {TEXT}}}'.encode()),
    ("a.json", LINES.encode()),
    ("a.jsonl", LINES.encode()),
    ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode()),
  ],
)
def test_each_spelling_of_json_is_read(tmp_path, name, data):
  (tmp_path / name).write_bytes(data)
  assert read(tmp_path / name) == ROWS


def test_parquet_is_read_from_a_file_and_from_shards(tmp_path):
  table = pa.Table.from_pylist(ROWS)
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)
  assert read(tmp_path / "a.parquet") == ROWS
  shards = tmp_path / "shards/data"
  shards.mkdir(parents=True)
  for i, part in enumerate((table[:100], table[100:])):
    pq.write_table(part, shards / f"train-0000{i}-of-00002.parquet")
  assert read(tmp_path / "shards") == ROWS
  pq.write_table(table, shards / "test-00000-of-00001.parquet")
  with pytest.raises(ValueError, match=r"Parquet files of \['test', 'train'\]"):
    read(tmp_path / "shards")


def test_saved_dataset_is_read(tmp_path):
  write_dataset(tmp_path / "set/train", ROWS)
  assert read(tmp_path / "set/train") == ROWS
  splits = tmp_path / "set/dataset_dict.json"
  splits.write_text('{"splits": ["train"]}')
  assert read(tmp_path / "set") == ROWS
  splits.write_text('{"splits": ["train", "test"]}')
  with pytest.raises(ValueError, match=r"set has the splits .* give the folder of one"):
    read(tmp_path / "set")


def test_dataset_with_selected_rows_is_an_error(tmp_path):
  write_dataset(tmp_path / "a", ROWS, _indices_data_files=[{"filename": "i.arrow"}])
  with pytest.raises(ValueError, match="flatten_indices"):
    read(tmp_path / "a")


@pytest.mark.parametrize(
  ("name", "data", "reason"),
  [
    ("a.json", "视频".encode("gbk"), r"a.json is not in UTF-8 \(byte 0xca .*GB18030"),
    ("a.jsonl", LINES.encode("utf-16"), "a.jsonl is in UTF-16: convert it"),
    ("a.json", b'{"a": [{}], "b": [{}]}', r'a.json .* object with \["a", "b"\]'),
    ("a.json", b'{"data": [], "rows": []}', "a.json .* put the records in a list"),
    ("a.json", b"3", "a.json must contain a list of records, not 3"),
    ("a.json", b"[" * 100_000, "a.json: invalid JSON"),
    ("a.json", b'{"a":' * 100_000, "a.json must contain a list of records"),
    ("a.parquet", b"PAR1 and no more", "a.parquet, after row 0"),
    ("a.parquet", b"", "a.parquet, after row 0"),
    ("a.csv", b"id", "a.csv: the name must be that of"),
    ("a.zip", b"PK", "a.zip: the name must be that of"),
  ],
)
def test_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name, data, reason):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=reason) as raised:
    read(tmp_path / name)
  assert "\n" not in str(raised.value)


def test_missing_file_and_empty_folder_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no file .*none.json"):
    read(tmp_path / "none.json")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty is a folder without records"):
    read(tmp_path / "empty")


@pytest.mark.parametrize("damage", ["cut", "offsets"])
def test_damaged_dataset_is_an_error(tmp_path, damage):
  write_dataset(tmp_path / "a", ROWS)
  file = tmp_path / "a/data-00001-of-00002.arrow"
  data = bytearray(file.read_bytes())
  if damage == "cut":
    data = data[: len(data) // 2]
  else:
    at = data.rindex(b"\x03\x00\x00\x00\x06\x00\x00\x00")  # Offsets of the ids.
    data[at : at + 4] = b"\xff\xff\xff\xff"
  file.write_bytes(data)
  with pytest.raises(ValueError, match="a, after row "):
    read(tmp_path / "a")


@pytest.mark.parametrize(
  ("bad", "reason"),
  [
    ("[" * 100_000 + "]" * 100_000, "its JSON is nested too deeply"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "its JSON is nested too deeply"),
    ("3", "a record must be a JSON object, not 3"),
  ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_one_bad_record_is_lost_alone(tmp_path, suffix, bad, reason):
  items = ['{"id": "[1"}', bad, '{"id": 2}']
  text = "\n".join(items) if suffix == "jsonl" else f" [{', '.join(items)}]"
  (tmp_path / f"a.{suffix}").write_text(text)
  assert read(tmp_path / f"a.{suffix}") == [{"id": "[1"}, reason, {"id": 2}]


def test_bad_lines_are_reasons(tmp_path):
  lines = [b'{"id": 1}', b'{"id": ', "视频".encode("gbk"), b'{"id": 4}']
  (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
  places, rows = zip(*read_file_rows(tmp_path / "a.jsonl"), strict=True)
  assert places == ("line 1", "line 2", "line 3", "line 4")
  assert rows[1].startswith("invalid JSON at column 7")
  assert rows[2].startswith("invalid UTF-8 at byte 1")
  assert (rows[0], rows[3]) == ({"id": 1}, {"id": 4})


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_integer_of_many_digits_stays_as_text(tmp_path, suffix):
  row = f'{{"id": {"9" * 5000}}}'
  text = row if suffix == "jsonl" else f"[{row}]"
  (tmp_path / f"a.{suffix}").write_text(text)
  assert read(tmp_path / f"a.{suffix}") == [{"id": "9" * 5000}]
