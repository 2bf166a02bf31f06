"""The video of a record: paths, frames, bytes, and a part in time."""

import base64
import hashlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmrlaif_jax.core.jsonl import write_records
from vlmrlaif_jax.data.records import read_preferences, read_records


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "frames").mkdir()
  for name in ("a.mp4", "b.mp4", "x.webm", "frames/1.jpg", "frames/2.jpg"):
    (tmp_path / name).touch()
  return tmp_path


def image(color):
  out = io.BytesIO()
  Image.new("RGB", (4, 4), color).save(out, "PNG")
  return out.getvalue()


def read(folder, row):
  row = {"question": "A?", "answer": "a"} | row
  write_records(folder / "set.jsonl", [row])
  return read_records(folder / "set.jsonl")


@pytest.mark.parametrize(
  "row",
  [
    {"start": 1.5, "end": 3},
    {"start": "1.5", "end": "00:00:03"},
    {"video_start": 1.5, "video_end": 3.0},
    {"start_time": "0:01.5", "end_time": "0:03"},
    {"clip_start": 1.5, "clip_end": 3, "start": None},
    {"start": 1.5, "end": 3, "video_start": 1.5, "video_end": 3},
  ],
)
def test_part_of_a_video_is_its_name(folder, row):
  [example], _ = read(folder, {"video": "a.mp4"} | row)
  assert example["video"] == f"{folder / 'a.mp4'}#t=1.5,3"


def test_part_of_a_video_may_be_in_a_message(folder):
  part = {"type": "video", "video": "a.mp4", "video_start": 60}
  content = [part, {"type": "text", "text": "A?"}]
  talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
  write_records(folder / "set.jsonl", [{"messages": talk}])
  [example], _ = read_records(folder / "set.jsonl")
  assert example["video"] == f"{folder / 'a.mp4'}#t=60"


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"videos": ["a.mp4", "b.mp4"], "start": 1}, "name the part of each"),
    ({"videos": [["a.mp4", "b.mp4"]]}, "a list of 2 files is one video"),
    ({"video": "a.mp4", "image": "frames/3.jpg"}, "frames/3.jpg"),
    ({"video": "a.mp4", "videos": ["b.mp4"]}, '"video" and "videos" differ'),
    ({"video": "https://a.org/a.mp4"}, "not an address: download https://a.org/a.mp4"),
    ({"video": ""}, 'it has no "video"'),
    ({"video": [" "]}, "video must be a path"),
    ({"video": {"name": "a.mp4"}}, "not an object with ['name']"),
    ({"video": "a\ud800.mp4"}, "U+D800 at index 1"),
    ({"video": "a.mp4", "start": 3, "end": 1}, "end must be greater than start"),
    ({"video": "a.mp4", "start": -1}, "must be seconds >= 0"),
    ({"video": "a.mp4", "start": "soon"}, '"start" must be a time in seconds'),
    ({"video": "a.mp4", "start": 10**400}, "too large"),
    ({"video": "a.mp4", "start": 1, "video_start": 2}, "several starts"),
    ({"video": "a.mp4#t=1,2", "start": 1}, "the name of its video has another"),
    ({"video": "a.mp4#t=3,1"}, "end must be greater than start"),
    ({"video": "frames", "start": 1}, "frames have no time"),
    ({"images": ["frames/1.jpg", "frames/2.jpg"], "end": 2}, "frames have no time"),
    ({"image": "data:image/png;base64,AAAA"}, "its bytes are no known image or video"),
    ({"image": "data:image/png;base64,A"}, "no valid base64"),
    ({"question": "<video><video>A?", "video": "a.mp4"}, "2 placeholders"),
    (
      {"question": "<image><image><image>A?", "video": ["frames/1.jpg"] * 2},
      "3 placeholders",
    ),
  ],
)
def test_video_that_cannot_be_read_as_meant_is_a_reason(folder, row, reason):
  examples, [problem] = read(folder, row)
  assert examples == [] and reason in problem.reason


@pytest.mark.parametrize("count", [0, 1, 2])
def test_frames_have_no_placeholder_one_or_one_each(folder, count):
  row = {
    "images": ["frames/1.jpg", "frames/2.jpg"],
    "question": "<image>" * count + "A?",
  }
  [example], _ = read(folder, row)
  assert example["video"] == [str(folder / f"frames/{i}.jpg") for i in (1, 2)]


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("x", "x.webm"),
    ("x.pkl", "x.webm"),
    ("X.MP4", "x.webm"),
    ("A.MP4#t=1", "a.mp4#t=1"),
  ],
)
def test_suffix_of_a_video_may_be_missing(folder, name, file):
  [example], _ = read(folder, {"video": name})
  assert example["video"] == str(folder / file)


def test_bytes_are_written_once_by_their_hash(folder):
  red, blue = image("red"), image("blue")
  digest = lambda data: hashlib.sha256(data).hexdigest()[:32]
  address = f"data:image/png;base64,{base64.b64encode(red).decode()}"
  rows = [
    {"idx": i, "image": {"bytes": data, "path": None}, "image_path": "gone.jpg"}
    | {"question": "A?", "chosen": f"a{i}", "rejected": "b"}
    for i, data in enumerate((red, blue, red))
  ]
  pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
  pairs, problems = read_preferences(folder / "p.parquet", written=folder / "media")
  assert problems == [] and [pair["id"] for pair in pairs] == ["0", "1", "2"]
  names = [str(folder / f"media/{digest(data)}.png") for data in (red, blue, red)]
  assert [pair["video"] for pair in pairs] == names
  assert len(list((folder / "media").iterdir())) == 2
  write_records(folder / "s.jsonl", [{"image": address, "question": "A?", "answer": 1}])
  [example], _ = read_records(folder / "s.jsonl", written=folder / "media")
  assert example["video"] == names[0]
  assert (folder / "media" / f"{digest(red)}.png").read_bytes() == red


def test_bytes_are_written_next_to_the_file_by_default(folder):
  rows = [{"images": [{"bytes": image("red")}], "question": "A?", "answer": "a"}]
  pq.write_table(pa.Table.from_pylist(rows), folder / "s.parquet")
  [example], _ = read_records(folder / "s.parquet")
  assert example["video"].startswith(str(folder / "s.parquet_media/"))


def test_path_is_used_where_a_table_has_no_bytes(folder):
  rows = [{"image": {"bytes": None, "path": "frames/1.jpg"}, "q": "A?", "a": "a"}]
  pq.write_table(pa.Table.from_pylist(rows), folder / "s.parquet")
  [example], _ = read_records(folder / "s.parquet")
  assert example["video"] == str(folder / "frames/1.jpg")


def test_examples_with_all_fields_are_read_back(folder):
  talk = [
    {"role": "user", "content": "<video>Is <image> red?"},
    {"role": "assistant", "content": "a", "loss": False},
    {"role": "user", "content": "B?"},
    {"role": "assistant", "content": "b"},
  ]
  row = {"id": "1", "video": "a.mp4", "end": 2, "system": "Be.", "messages": talk}
  examples, _ = read(folder, row | {"question": None, "answer": None})
  assert examples[0]["loss"] == [False, True]
  (folder / "again.json").write_text(json.dumps(examples))
  assert read_records(folder / "again.json") == (examples, [])
