"""Abilities: what is right counts as right, and what is wrong does not."""

import json

import pytest

from tools import abilities
from vlmrlaif_jax.data import features
from vlmrlaif_jax.data.world import language, scene


@pytest.fixture(scope="module")
def videos(one):
  examples = one.splits.benchmark
  return list({features.format_video_name(e["video"]): e for e in examples}.values())


def shares(rows):
  return {row["ability"]: row["right"] for row in rows}


def test_answers_are_right_by_kind(one, monkeypatch):
  examples = [e for e in one.splits.benchmark if e["truth"]["kind"] != "description"]
  truths = {e["id"]: e["truth"]["answer"] for e in examples}
  wrong = next(e for e in examples if e["truth"]["kind"] == "motion")
  truths[wrong["id"]] = "Blue rain."
  monkeypatch.setattr(
    abilities,
    "_generate_replies",
    lambda run, variables, queries: [truths[q[0]] for q in queries],
  )
  found = shares(abilities.measure_answers(one, one.base, one.splits.benchmark))
  assert found.pop("answer: motion") < 1
  assert set(found.values()) == {1.0}


def write_captions(one, videos, path, text):
  """What `text` says of each clip of each video."""
  with open(path, "w") as file:
    for example in videos:
      shown = scene.scene_from_json(example["truth"]["scene"])
      name = one.features.files[features.format_video_name(example["video"])].stem
      for start, stop in ((0, 2), (2, 3)):  # Of three frames, which are of 24.
        row = {"video": name, "start": start, "stop": stop}
        file.write(json.dumps({**row, "caption": text(shown, start * 8, stop * 8)}))
        file.write("\n")


def test_true_captions_are_wholly_right(one, videos, tmp_path):
  path = tmp_path / "captions.jsonl"
  write_captions(one, videos, path, language.describe_scene)
  found = shares(abilities.measure_captions(one, one.base, videos, path))
  assert found == {"caption: statements": 1.0, "caption: wholly right": 1.0}


def test_captions_of_the_whole_video_are_not_right_of_its_clips(one, videos, tmp_path):
  path = tmp_path / "captions.jsonl"
  invented = "The large red ring moves up. Nonsense."
  write_captions(one, videos, path, lambda *shown: invented)
  found = shares(abilities.measure_captions(one, one.base, videos, path))
  assert found["caption: wholly right"] == 0
  assert found["caption: statements"] < 0.8


def test_judge_that_knows_is_right_and_one_of_one_place_keeps_nothing(
  one, videos, tmp_path, monkeypatch
):
  path = tmp_path / "captions.jsonl"
  write_captions(one, videos, path, language.describe_scene)
  seen = []

  def first_is_better(run, variables, queries, judging):
    seen.extend(queries)
    return ["Output A is better."] * len(queries)

  monkeypatch.setattr(abilities, "_generate_replies", first_is_better)
  rows = {
    row["ability"]: row for row in abilities.measure_judgments(one, 0, videos, path)
  }
  assert len(rows) == 6
  assert all(rows[name]["right"] == 0 for name in rows if "all pairs" in name)
  assert all(rows[name]["of"] == 0 for name in rows if "kept" in name)
  assert sum("Context:" in query.prompt for query in seen) == len(seen) * 2 // 3


def test_all_abilities_are_written(one, tmp_path):
  config = one.config.copy_and_resolve_references()
  config.label.update(caption_prompt_len=64, caption_max_new=4, judge_max_new=2)
  rows = abilities.measure(one._replace(config=config), tmp_path)
  assert json.loads((tmp_path / "abilities.json").read_text()) == rows
  assert {"answer: count", "caption: statements"} < set(shares(rows))
  assert any(name.startswith("judge, told true captions") for name in shares(rows))


def test_only_the_embedded_world_is_measured(one, tmp_path):
  plain = [{k: v for k, v in e.items() if k != "truth"} for e in one.splits.benchmark]
  run = one._replace(splits=one.splits._replace(benchmark=plain))
  with pytest.raises(ValueError, match="embedded world"):
    abilities.measure(run, tmp_path)
