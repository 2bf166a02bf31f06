"""A user's own records and videos, some of them bad: told by name, and left out."""

import json
import pathlib
import re
import subprocess
import sys

import av
import numpy as np
import pytest

from tests.helpers import several, small
from vlmrlaif_jax.runtime import loading

ROOT = pathlib.Path(__file__).parents[2]
GOOD, VIDEOS = 195, 30
BAD = {
  "cut-off": "truncated.mp4",
  "zero-bytes": "empty.mp4",
  "a-text": "text.mp4",
  "no-answer": "0.mp4",
  "record-17#2": "17.mp4",  # A record that there is already.
}


def write_video(path, frames):
  rng = np.random.default_rng(frames)
  with av.open(path, "w") as container:
    stream = container.add_stream("mpeg4", rate=8)
    stream.width = stream.height = 32
    for _ in range(frames):
      pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())


def record(name, video, answer="A red ring."):
  turns = [{"from": "human", "value": "<video>\nWhat moves?"}]
  if answer:
    turns.append({"from": "gpt", "value": answer})
  return {"id": name, "video": video, "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """records.json with 200 records, and videos/: from 1 frame on, so some are short."""
  folder = tmp_path_factory.mktemp("bad")
  videos = folder / "videos"
  videos.mkdir()
  for i in range(VIDEOS):
    write_video(videos / f"{i}.mp4", frames=1 + i % 8)
  write_video(videos / "whole.mp4", frames=8)
  (videos / "truncated.mp4").write_bytes((videos / "whole.mp4").read_bytes()[:700])
  (videos / "empty.mp4").touch()
  (videos / "text.mp4").write_text("This is no video.\n" * 50)
  answers = ["A ring.", "The red ring moves.", "A small red ring moves left."]
  rows = [
    record(f"record-{i}", f"{i % VIDEOS}.mp4", answers[i % 3]) for i in range(GOOD)
  ]
  bad = [
    record(name.removesuffix("#2"), video, "" if name == "no-answer" else answers[2])
    for name, video in BAD.items()
  ]
  # Of two records of an id, the second is the bad one.
  rows = [*bad[:2], *rows[:50], *bad[2:], *rows[50:]]
  (folder / "records.json").write_text(json.dumps(rows))
  return folder


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, folder):
  return {
    "data.records": str(folder / "records.json"),
    "data.videos": str(folder / "videos"),
    "model.path": str(tiny_checkpoint),
    "model.frames": 3,
    "sft.batch_size": 4,
    "sft.short_steps": 2,
    "sft.long_steps": 2,
    "sft.optimizer.warmup_steps": 0,
  }


@pytest.fixture(scope="module")
def said(settings, folder):
  """What the launcher prints."""
  return launched(folder / "run", settings, code=0)


def launched(workdir, settings, *, code):
  process = subprocess.run(
    [
      sys.executable, ROOT / "launch" / "run.py", "--config=configs/sft.py",
      f"--workdir={workdir}", *small.flags(settings),
    ],
    cwd=ROOT, env=several.environment(), capture_output=True, text=True,
  )  # fmt: skip
  assert process.returncode == code, process.stdout[-2000:] + process.stderr[-3000:]
  return process.stdout + process.stderr


def reasons_by_id(text):
  """The reason of each skipped record, from lines "  FILE: ID, ID: REASON"."""
  lines = re.findall(
    r"^  (?:[\w.]+: )?([\w#-]+(?:, [\w#-]+)*): (.+)$", text, re.MULTILINE
  )
  return {name: reason for names, reason in lines for name in names.split(", ")}


def test_bad_records_are_named_with_what_is_wrong(said):
  assert "5 of 200 records skipped:" in said
  reasons = reasons_by_id(said)
  assert all(len(reasons[name]) > 5 for name in BAD)
  assert "no-answer: it has no answer" in said
  assert "record-17#2: it equals an earlier record with the id record-17" in said


def test_training_finishes_on_the_others(said, folder):
  for stage in ("sft_short", "sft_long"):
    assert f"{stage}: done in" in said
    assert (folder / "run" / stage / "done.json").exists()
    assert len(small.metrics(folder / "run" / stage)) == 2


def test_all_good_records_are_in_the_data(said, settings, folder):
  made = small.config(settings, ("sft_short", "sft_long"))
  notes = []
  run = loading.create_run(made, folder / "run", note=notes.append)
  ids = [e["id"] for e in [*run.splits.sft, *run.splits.benchmark]]
  assert sorted(ids) == sorted(f"record-{i}" for i in range(GOOD))
  assert len(run.splits.benchmark) > 5
  assert reasons_by_id("\n".join(notes)).keys() >= set(BAD)


def test_every_good_record_of_sft_is_learned_from(said, folder):
  counts = [
    json.loads((folder / "run" / stage / "done.json").read_text())["summary"]
    for stage in ("sft_short", "sft_long")
  ]
  assert [count["left_out"] for count in counts] == [0, 0]
  total = sum(count["examples"] for count in counts)
  assert 0.8 * GOOD < total < GOOD  # But for the share that is held out.


def test_missing_files_are_named_with_what_belongs_there(folder, settings):
  missing = {"data.records": folder / "no.json", "data.videos": folder / "no"}
  said = launched(folder / "never", {**settings, **missing}, code=2)
  assert f"--config.data.records={folder / 'no.json'}" in said
  assert "a .json, .jsonl or .parquet file with records" in said
  assert f"--config.data.videos={folder / 'no'}\n" in said
  assert "the folder of the videos that the records name" in said
  assert "Traceback" not in said and not (folder / "never").exists()


def test_a_file_that_is_no_json_is_refused_with_the_place(folder, settings):
  broken = folder / "broken.json"
  broken.write_text('[{"id": 1},\n {"id": }]')
  said = launched(folder / "never2", {**settings, "data.records": str(broken)}, code=2)
  assert "broken.json, line 2, column 9: invalid JSON" in said
  assert "Traceback" not in said
