"""The builder: what it makes, that it makes it again the same, without TensorFlow."""

import json
import sys
import tempfile

import pytest

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.data import records
from vlmrlaif_jax.data.world import builder, language, scene

SIZES = {"pretrain": 2, "sft": 4, "benchmark": 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp("world")
  builder.build_world(folder, sizes=SIZES, seed=0)
  return folder


def rows(folder, split):
  return sorted(builder.read_split(folder, split), key=lambda row: row["id"])


def videos(folder):
  found = sorted((folder / "videos").rglob("*.mp4"))
  return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("split", SIZES)
def test_split_holds_what_was_made(built, split, tmp_path):
  (tmp_path / "videos" / split).mkdir(parents=True)
  made = [
    row
    for index in range(SIZES[split])
    for row in builder.make_records(split, index, seed=0, folder=tmp_path)
  ]
  assert rows(built, split) == sorted(made, key=lambda row: row["id"])


def test_seed_and_split_and_index_each_change_the_scene(tmp_path):
  def scene_of(split, index, seed):
    (tmp_path / "videos" / split).mkdir(parents=True, exist_ok=True)
    row, *_ = builder.make_records(split, index, seed=seed, folder=tmp_path)
    return json.dumps(row["truth"]["scene"])

  places = [("sft", 0, 0), ("sft", 1, 0), ("sft", 0, 1), ("prompts", 0, 0)]
  assert len({scene_of(*place) for place in places}) == 4


def test_sizes_of_other_splits_change_nothing(built, tmp_path):
  builder.build_world(tmp_path, sizes={"benchmark": 2}, seed=0)
  kept = [row for row in rows(built, "benchmark") if row["id"][10] in "01"]
  assert rows(tmp_path, "benchmark") == kept


def test_building_again_makes_nothing_anew(built):
  files = lambda: [path for path in built.rglob("*") if path.is_file()]
  times = lambda: {path: path.stat().st_mtime_ns for path in files()}
  before = times()
  builder.build_world(built, sizes=SIZES, seed=0)
  assert times() == before


def test_killed_build_is_finished_by_the_next(built, tmp_path, monkeypatch):
  made = []

  def dies(split, index, *, seed, folder):
    made.append(index)
    if len(made) > 4:
      raise KeyboardInterrupt
    return real(split, index, seed=seed, folder=folder)

  real = builder.make_records
  monkeypatch.setattr(builder, "make_records", dies)
  with pytest.raises(KeyboardInterrupt):
    builder.build_world(tmp_path, sizes=SIZES, seed=0)
  monkeypatch.setattr(builder, "make_records", real)
  builder.build_world(tmp_path, sizes=SIZES, seed=0)
  assert rows(tmp_path, "sft") == rows(built, "sft")
  assert videos(tmp_path) == videos(built)


def test_tensorflow_is_not_imported(built):
  assert "tensorflow" not in sys.modules


def test_records_are_read_as_a_users_are(built, tmp_path):
  jsonl.write_records(tmp_path / "sft.jsonl", rows(built, "sft"))
  examples, problems = records.read_records(
    tmp_path / "sft.jsonl", videos=built / "videos"
  )
  assert problems == [] and len(examples) > 4
  assert all(example["answer"] for example in examples)


def test_only_instruction_data_holds_answers(built):
  turns = lambda split: {len(row["conversations"]) for row in rows(built, split)}
  assert (turns("sft"), turns("benchmark")) == ({2}, {1})


def test_truth_is_of_the_question(built):
  for row in rows(built, "benchmark"):
    truth, question = row["truth"], row["conversations"][0]["value"]
    described = truth["kind"] == "description"
    assert described == question.endswith(language.DESCRIBE_EVENTS)
    if described:
      seen = scene.scene_from_json(truth["scene"])
      assert language.count_mistakes(truth["answer"], seen) == 0


def test_no_question_is_asked_twice_of_a_video(built):
  made = rows(built, "benchmark")
  asked = [(row["video"], row["conversations"][0]["value"]) for row in made]
  assert len(set(asked)) == len(asked) > 6


def test_the_shifted_split_alone_looks_unlike_the_others(tmp_path, monkeypatch):
  looks = []
  real = scene.render_scene

  def render(truth, look):
    looks.append(look)
    return real(truth, look)

  monkeypatch.setattr(scene, "render_scene", render)
  for split in builder.WORLD_SPLITS:
    (tmp_path / "videos" / split).mkdir(parents=True)
    builder.make_records(split, 0, seed=0, folder=tmp_path)
  assert looks == [
    scene.SHIFTED_STYLE if split == "shifted" else scene.USUAL_STYLE
    for split in builder.WORLD_SPLITS
  ]


def test_unknown_split_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"not \['test'\]"):
    builder.build_world(tmp_path, sizes={"test": 1}, seed=0)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
  temporary = tmp_path / "temporary"
  temporary.mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(temporary))
  builder.build_world(tmp_path / "world", sizes={"benchmark": 1}, seed=0)
  assert not [*temporary.iterdir()]
