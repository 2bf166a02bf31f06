"""Runs of a study: their commands, what they share, what is read of them."""

import json

import pytest

from tools import study
from tools import study_arms as configured
from tools.study import Arm
from vlmrlaif_jax.core import jsonl

ARMS = (
  Arm("base", once=True, recipe="pretrain.py:small", output="export/done"),
  Arm("demo", export="sft_long"),
  Arm("few", flags=("a={demo}/x", "b={study}/y"), start="demo", pairs=0.5),
)


def made(tmp_path, seeds=(0, 1)):
  return {job.name: job for job in study.list_jobs(ARMS, seeds, tmp_path)}


def test_jobs_of_each_seed_stand_after_each_other(tmp_path):
  assert list(made(tmp_path)) == [
    *("base", "demo-0", "demo-0: export", "few-0"),
    *("demo-1", "demo-1: export", "few-1"),
  ]


def test_command_names_the_workdirs_of_its_seed(tmp_path):
  command = made(tmp_path)["few-1"].command
  assert f"--config.a={tmp_path}/demo-1/x" in command
  assert f"--config.b={tmp_path}/y" in command
  assert f"--workdir={tmp_path}/few-1" in command
  assert "--config.seed=1" in command


def test_command_of_a_share_names_its_own_preferences(tmp_path):
  path = tmp_path / "few-0" / "data" / "preferences.jsonl"
  assert f"--config.rm.preferences={path}" in made(tmp_path)["few-0"].command


def test_an_arm_made_once_has_no_seed(tmp_path):
  job = made(tmp_path)["base"]
  assert not [part for part in job.command if part.startswith("--config.seed")]
  assert job.output == tmp_path / "base" / "export" / "done"


def test_jobs_refuse_a_start_that_comes_later(tmp_path):
  with pytest.raises(ValueError, match="few starts from 'demo'"):
    study.list_jobs(ARMS[::-1], (0,), tmp_path)


def demo(tmp_path, pairs=10):
  folder = tmp_path / "demo-0"
  for stage in ("features", "label", "sft_short"):
    (folder / stage).mkdir(parents=True)
  (folder / "world").mkdir()
  kinds = ["count", "motion", "description"]
  rows = [{"id": kind, "truth": {"kind": kind}} for kind in kinds]
  jsonl.write_records(folder / "world" / "sft.jsonl", rows)
  rows = [{"id": str(number)} for number in range(pairs)]
  jsonl.write_records(folder / "label" / "preferences.jsonl", rows)


def prepared(tmp_path, **given):
  arms = (Arm("demo"), Arm("other", start="demo", **given))
  job = study.list_jobs(arms, (0,), tmp_path)[1]
  study.prepare(job)
  return job.folder


def test_prepare_links_what_is_shared(tmp_path):
  demo(tmp_path)
  folder = prepared(tmp_path, shared=("sft_short",))
  shared = {path.name for path in folder.iterdir() if path.is_symlink()}
  assert shared == {"world", "features", "sft_short"}
  assert (folder / "world" / "sft.jsonl").exists()


def test_prepare_twice_changes_nothing(tmp_path):
  demo(tmp_path)
  once = sorted(prepared(tmp_path, pairs=0.3).rglob("*"))
  assert sorted(prepared(tmp_path, pairs=0.3).rglob("*")) == once


def test_prepare_writes_the_records_of_its_kinds(tmp_path):
  demo(tmp_path)
  folder = prepared(tmp_path, kinds=("count", "description"))
  rows = jsonl.read_jsonl(folder / "data" / "sft.jsonl")
  assert [row["id"] for row in rows] == ["count", "description"]


def test_prepare_writes_a_share_of_the_preferences(tmp_path):
  demo(tmp_path)
  folder = prepared(tmp_path, pairs=0.3)
  assert len(jsonl.read_jsonl(folder / "data" / "preferences.jsonl")) == 3


def test_prepare_says_what_it_would_start_from(tmp_path):
  with pytest.raises(FileNotFoundError, match="demo-0/world"):
    prepared(tmp_path)


def test_a_smaller_subset_is_part_of_a_larger():
  rows = [{"id": number} for number in range(20)]
  small, large = (study.select_subset(rows, share, seed=3) for share in (0.25, 0.5))
  assert len(small) == 5 and len(large) == 10
  assert all(row in large for row in small)


def test_value_is_none_where_nothing_was_measured(tmp_path):
  assert study.read_mean(tmp_path, "sft", "accuracy") is None


def test_value_is_the_mean_of_a_measure(tmp_path):
  (tmp_path / "eval").mkdir()
  policies = {"ppo": {"count.accuracy": {"mean": 0.25}}}
  results = {"held_out": {"policies": policies}}
  (tmp_path / "eval" / "results.json").write_text(json.dumps(results))
  assert study.read_mean(tmp_path, "ppo", "count.accuracy") == 0.25


def test_every_row_of_the_tables_is_of_an_arm():
  arms = {arm.name for arm in configured.ARMS}
  assert {row.arm for table in configured.TABLES for row in table.rows} <= arms


def test_arms_start_from_arms_before_them(tmp_path):
  assert study.list_jobs(configured.ARMS, configured.SEEDS, tmp_path)
