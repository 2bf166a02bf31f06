"""Damaged files of blocks, captions, caches, features and the world."""

import re

import numpy as np
import pytest

from tests.data.test_features import build
from tests.faults.damage import cut, flip, remove, replace_line, write
from tests.stages.labeling.test_pairwise import (
  made_up_run,
  run_stage,
  scripted,
  written,
)
from vlmrlaif_jax.core import jsonl, resumable
from vlmrlaif_jax.core.errors import ResumableError
from vlmrlaif_jax.data.world import repair, scene
from vlmrlaif_jax.stages.labeling import pairwise


def drop_key(path, key, line=1):
  """Removes a key of a row, as a file of an earlier version may lack its checksum."""
  rows = jsonl.read_jsonl(path)
  rows[line - 1] = {k: x for k, x in rows[line - 1].items() if k not in (key, "crc32")}
  jsonl.write_records(path, rows)


def drop_last_line(path):
  jsonl.write_records(path, jsonl.read_jsonl(path)[:-1])


@pytest.fixture
def labeled(tmp_path, monkeypatch):
  """(run, requests of each call, files) after the stage `label`."""
  asked = []
  monkeypatch.setattr(pairwise.answering, "answer_requests", scripted(asked))
  run = made_up_run(tmp_path)
  run_stage(run)
  asked.clear()
  return run, asked, written(run)


@pytest.mark.parametrize(
  "damage",
  [
    cut,
    flip,
    write(b""),
    drop_last_line,
    replace_line(2, b"\0" * 50),
    replace_line(2, b"\xff"),
    lambda path: drop_key(path, "outcome"),
  ],
)
def test_only_the_damaged_block_is_labeled_again(labeled, damage, capsys):
  run, asked, whole = labeled
  blocks = run.workdir / "label" / "blocks"
  damage(blocks / "block_00001.jsonl")
  run_stage(run)
  assert written(run) == whole
  answers = [r.id for call in asked for r in call if r.id.startswith("answer:")]
  assert len(answers) == 4  # A block of four prompts.
  line = re.search(r"block_00001.jsonl: line \d.* is damaged", capsys.readouterr().out)
  assert line


def find_captions(run):
  rows = jsonl.read_jsonl(run.workdir / "label" / "captions.jsonl")
  return {(row["video"], row["start"]): row["caption"] for row in rows}


@pytest.mark.parametrize(
  "damage",
  [flip, replace_line(3, b"\xff"), lambda path: drop_key(path, "caption", 3)],
)
def test_only_the_damaged_caption_is_written_again(labeled, damage, capsys):
  run, asked, _ = labeled
  before = find_captions(run)
  damage(run.workdir / "label" / "captions.jsonl")
  for path in (run.workdir / "label" / "blocks").iterdir():
    path.unlink()
  run_stage(run)
  assert find_captions(run) == before
  captions = [r.id for call in asked for r in call if r.id.startswith("caption:")]
  assert len(captions) == 1
  assert "captions.jsonl: line" in capsys.readouterr().out


@pytest.mark.parametrize(
  "damage", [cut, flip, write(b""), replace_line(4, b"\0"), replace_line(4, b"\xff")]
)
def test_cached_rows_are_computed_again_from_the_damaged_one(tmp_path, damage):
  made = []

  def make(block):
    made.extend(block)
    return [{"row": i, "text": "abc" * 9} for i in block]

  compute = lambda: resumable.load_or_compute(
    tmp_path / "rows.jsonl", make, count=9, batch=1, fingerprint="f"
  )
  whole, content = compute(), (tmp_path / "rows.jsonl").read_bytes()
  made.clear()
  damage(tmp_path / "rows.jsonl")
  assert compute() == whole and (tmp_path / "rows.jsonl").read_bytes() == content
  assert made and made[-1] == 8


@pytest.fixture
def clip(tmp_path):
  path = tmp_path / "clip.mp4"
  scene.write_mp4(
    path, scene.render_scene(scene.sample_scene(np.random.default_rng(0)))
  )
  return str(path)


@pytest.mark.parametrize("removed", [1, 5, 20, 10_000])
def test_features_of_another_length_are_encoded_again(clip, tmp_path, removed):
  store, notes = build([clip], tmp_path), []
  file, whole = store.files[clip], store.files[clip].read_bytes()
  file.write_bytes(whole[:-removed])
  build([clip], tmp_path, note=notes.append)
  assert file.read_bytes() == whole and any(str(file) in line for line in notes)


def test_changed_features_are_found_when_they_are_read(clip, tmp_path):
  store = build([clip], tmp_path)
  file, whole = store.files[clip], store.files[clip].read_bytes()
  file.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
  with pytest.raises(ResumableError, match=re.escape(str(file))):
    build([clip], tmp_path).get(clip)
  assert not file.exists()
  np.testing.assert_array_equal(build([clip], tmp_path).get(clip), store.get(clip))
  assert file.read_bytes() == whole


def test_features_of_an_earlier_version_are_read(clip, tmp_path):
  store = build([clip], tmp_path)
  file = store.files[clip]
  file.write_bytes(file.read_bytes()[:-9])
  notes = []
  np.testing.assert_array_equal(
    build([clip], tmp_path, note=notes.append).get(clip), store.get(clip)
  )
  assert notes == []


SIZES = {"sft": 2, "benchmark": 1}


@pytest.fixture
def world(tmp_path):
  """(folder, its files) of a rendered world."""
  repair.load_world(tmp_path, sizes=SIZES, seed=0)
  return tmp_path, read_world(tmp_path)


def read_world(folder):
  paths = [*folder.glob("*.jsonl"), *folder.glob("videos/*/*")]
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", ["videos/sft/000001.mp4", "sft.jsonl"])
@pytest.mark.parametrize("damage", [cut, flip, write(b""), remove])
def test_a_damaged_file_of_the_world_is_written_again(world, name, damage):
  folder, whole = world
  notes = []
  damage(folder / name)
  for _ in range(2):
    repair.load_world(folder, sizes=SIZES, seed=0, note=notes.append)
    assert read_world(folder) == whole
  assert [name in line for line in notes] == [True]


@pytest.mark.parametrize(
  "pattern, damage, has_hashes",
  [
    ("*.array_record*", cut, True),
    ("*.array_record*", flip, True),
    ("dataset_info.json", write(b""), True),
    ("features.json", remove, True),
    ("*.array_record*", cut, False),
    ("dataset_info.json", write(b""), False),
  ],
)
def test_a_damaged_data_set_of_the_world_is_rendered_again(
  world, pattern, damage, has_hashes
):
  folder, whole = world
  notes = []
  for path in folder.glob(f"world/*/{pattern}"):
    damage(path)
  if not has_hashes:  # As in the world of an earlier version.
    (folder / "hashes.json").unlink()
    (folder / "sft.jsonl").unlink()
  for _ in range(2):
    repair.load_world(folder, sizes=SIZES, seed=0, note=notes.append)
    assert read_world(folder) == whole
  assert notes and all(str(folder / "world") in line for line in notes)
