"""RLAIF-V over the base that is shipped: two small rounds, from files to a report."""

import json

import pytest

from configs import rlaif_v
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.data import records
from vlmrlaif_jax.recipes import runner

STAGES = ["sft_short", "sft_long", "claims_1", "dpo_1", "claims_2", "dpo_2", "eval"]


def config():
  made = rlaif_v.get_config()
  made.data.sizes.update(sft=12, prompts=24, benchmark=3)
  made.data.workers = 0
  made.mesh.update(data=1, fsdp=4, tensor=1)
  made.sft.update(batch_size=4, short_steps=1, long_steps=1)
  made.sft.optimizer.warmup_steps = 0
  made.rounds = 2
  made.claims.update(samples=6, batch=8, block=8, check_rows=8, balance=False)
  made.dpo.update(batch_size=4, steps=2, save_every=1)
  made.dpo.optimizer.warmup_steps = 0
  made.evaluate.update(batch=8, resamples=50)
  made.evaluate.held_out.update(judge=False, best_of=(2,))
  return made


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rounds") / "run"
  runner.run_recipe(config(), str(folder))
  return folder


def test_every_stage_of_every_round_is_done(workdir):
  assert [name for name in STAGES if (workdir / name / "done.json").exists()] == STAGES


def test_rounds_differ_in_policy_and_so_in_answers(workdir):
  first, second = (
    jsonl.read_jsonl(workdir / f"claims_{n}" / "answers.jsonl") for n in (1, 2)
  )
  assert first[0] != second[0]  # What the answers are of.
  by_id = {row["id"]: row["answers"] for row in first[1:]}
  both = [
    (by_id[row["id"]], row["answers"]) for row in second[1:] if row["id"] in by_id
  ]
  assert both and any(before != after for before, after in both)


def test_pairs_are_told_claim_by_claim(workdir):
  for number in (1, 2):
    path = workdir / f"claims_{number}" / "preferences.jsonl"
    pairs, problems = records.read_preferences(path, videos=workdir / "world/videos")
    assert len(pairs) >= 4 and not problems
    assert all("[-]" in pair["judge"] for pair in pairs)


def test_all_rounds_are_measured_and_shown(workdir):
  results = json.loads((workdir / "eval" / "results.json").read_text())["held_out"]
  assert list(results["policies"]) == ["sft", "dpo_1", "dpo_2", "dpo_2@2"]
  assert results["pair"] == ["sft", "dpo_2"]
  page = (workdir / "report.html").read_text()
  assert "DPO, round 2" in page and "has not run" not in page


def test_a_finished_workdir_is_left_as_it_is(workdir, capsys):
  before = (workdir / "dpo_2" / "selected.json").stat().st_mtime_ns
  runner.run_recipe(config(), str(workdir))
  assert (workdir / "dpo_2" / "selected.json").stat().st_mtime_ns == before
  assert capsys.readouterr().out.count("already done, skipped") == len(STAGES)
