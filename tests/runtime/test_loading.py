"""Data that leaves nothing to train on is refused before the first stage starts."""

import json
import pathlib

import pytest

from tests.helpers import small
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.runtime import loading, scoring, video


@pytest.fixture
def refused(tiny_settings, tmp_path):
  """The reason why a run over changed settings is not created."""

  def refuse(**changed):
    as_flag = lambda x: x if isinstance(x, int) else str(x)
    changed = {key.replace("__", "."): as_flag(x) for key, x in changed.items()}
    made = small.config({**tiny_settings, **changed})
    with pytest.raises((UserError, ValueError)) as error:
      loading.create_run(made, tmp_path / "run", note=lambda text: None)
    return str(error.value)

  return refuse


@pytest.fixture
def rows(tiny_world):
  found = jsonl.read_jsonl(tiny_world / "sft.jsonl")
  return [{k: x for k, x in row.items() if k != "truth"} for row in found]


def write(path, rows):
  path.write_text(json.dumps(rows))
  return path


def test_an_empty_file_is_refused(refused, tmp_path):
  path = write(tmp_path / "a.json", [])
  assert "a.json:\n  the file is empty" in refused(data__records=path)


@pytest.mark.parametrize("count", [1, 3])
def test_records_that_are_all_held_out_are_refused(refused, rows, tmp_path, count):
  same = [{**rows[0], "id": str(i)} for i in range(count)]
  path = write(tmp_path / "a.json", same)
  said = refused(data__records=path, data__benchmark="")
  assert "data.holdout=0.1 leaves no record to train on" in said
  assert f"the {count} records are about 1. Give records about more videos" in said


def test_videos_of_which_none_can_be_read_are_refused(refused, rows, tmp_path):
  video = tmp_path / "text.mp4"
  video.write_text("This is no video.")
  path = write(tmp_path / "a.json", [{**row, "video": str(video)} for row in rows])
  said = refused(data__records=path, data__allow_outside=True)
  assert f"no video of the {len(rows)} records of the split 'sft' can be read" in said
  assert "for example of" in said and "data.videos" in said


def test_a_model_that_reads_one_video_refuses_several_by_name(
  tiny_settings, rows, tmp_path
):
  several = {"id": "both", "video": [row["video"] for row in rows[:2]],
             "question": "Which is longer?", "answer": "The first."}  # fmt: skip
  path, lines = write(tmp_path / "a.json", [*rows, several]), []
  made = small.config({**tiny_settings, "data.records": str(path)}, ("sft_short",))
  run = loading.create_run(made, tmp_path / "run", note=lines.append)
  assert [e["id"] for e in run.splits.sft] == [row["id"] for row in rows]
  assert "both: it has 2 videos and images, but" in "\n".join(lines)
  pair = {"id": "p", "video": several["video"], "question": "A?", "chosen": "a",
          "rejected": "b"}  # fmt: skip
  jsonl.write_records(tmp_path / "p.jsonl", [pair])
  pairs, _ = video.read_run_preferences(run, tmp_path / "p.jsonl")
  scorable, [problem] = scoring.select_scorable(run, pairs)
  assert scorable == [] and "reads one per conversation" in problem.reason


def test_answers_that_are_all_too_long_are_refused(refused):
  said = refused(data__response_len=1)
  assert "records are too long: " in said and "data.response_len 1" in said


def test_prompts_that_are_all_too_long_are_refused(refused, tiny_world, tmp_path):
  prompts = jsonl.read_jsonl(tiny_world / "prompts.jsonl")
  turns = [{"from": "human", "value": "What moves? " * 50}]
  long = [{**row, "conversations": turns} for row in prompts]
  path = write(tmp_path / "a.json", long)
  assert "prompts are too long: " in refused(data__prompts=path)


def test_a_benchmark_without_answers_is_refused(refused, rows, tmp_path):
  asked = [{"id": row["id"], "video": row["video"], "question": "Who?"} for row in rows]
  said = refused(data__benchmark=write(tmp_path / "a.json", asked))
  assert "no record of data.benchmark=" in said and "give records with answers" in said


def test_too_few_preferences_are_refused_with_their_reasons(
  refused, tiny_world, tmp_path
):
  pairs = jsonl.read_jsonl(tiny_world / "preferences.jsonl")
  some = [*pairs[:3], {**pairs[3], "preference": 3}]
  said = refused(rm__preferences=write(tmp_path / "a.json", some))
  assert "a.json has 3 usable preferences, fewer than the 4 that are needed" in said
  assert "preference must be 1 or 2, not 3" in said and "--config.rm.batch_size" in said


def test_preferences_that_are_all_held_out_are_refused(refused, tiny_world, tmp_path):
  pair = jsonl.read_jsonl(tiny_world / "preferences.jsonl")[0]
  same = [{**pair, "id": str(i)} for i in range(4)]
  said = refused(rm__preferences=write(tmp_path / "a.json", same))
  assert "rm.holdout=0.15 leaves no record to train on" in said


def test_an_unreadable_benchmark_is_refused_only_if_it_is_measured(
  tiny_settings, tiny_world, tmp_path
):
  video = pathlib.Path(tmp_path / "text.mp4")
  video.write_text("This is no video.")
  rows = jsonl.read_jsonl(tiny_world / "benchmark.jsonl")
  path = write(tmp_path / "a.json", [{**row, "video": str(video)} for row in rows])
  settings = {**tiny_settings, "data.benchmark": str(path), "data.allow_outside": True}
  create = lambda *stages: loading.create_run(
    small.config(settings, stages), tmp_path / "run", note=lambda text: None
  )
  assert create("sft_short").splits.benchmark == []
  with pytest.raises(UserError, match="of the split 'benchmark' can be read"):
    create("sft_short", "eval")
