"""Tables beside the evaluation's: benchmarks, judges, settings that differ."""

from tests.helpers.made_run import stat, write_facts, write_json
from vlmrlaif_jax.report.files import open_report_workdir
from vlmrlaif_jax.report.page import write_report
from vlmrlaif_jax.report.tables import collect_benchmarks, collect_judges


def write_scores(root, policy, mean, *, frames=12, unjudged=0):
  told = {
    "policy": policy,
    "scores": {"chair_s": stat(mean, 0.05, 189), "by.words": {"mean": 15.5}},
    "counts": {"cases": 189, "unjudged": unjudged},
    "recipe": {"frames": frames, "judge": {"name": "rules"}},
  }
  write_json(root / "benchmarks/chair" / policy / "scores.json", told)


def test_policies_stand_beside_each_other_sft_first(tmp_path):
  write_scores(tmp_path, "ppo", 0.16)
  write_scores(tmp_path, "sft", 0.68)
  (table,) = collect_benchmarks({"": open_report_workdir(tmp_path, "benchmarks")})
  assert (table["name"], table["columns"]) == ("chair", ["SFT", "PPO"])
  first, second = table["rows"]
  assert first["cells"] == ["0.680 [0.630, 0.730]", "0.160 [0.110, 0.210]"]
  assert (first["difference"], first["apart"], first["n"]) == ("−0.520", True, 189)
  assert second["measure"] == "by: words" and second["cells"] == ["15.500"] * 2
  assert not second["apart"]


def test_intervals_that_meet_are_not_apart(tmp_path):
  write_scores(tmp_path, "sft", 0.5)
  write_scores(tmp_path, "ppo", 0.55)
  (table,) = collect_benchmarks({"": open_report_workdir(tmp_path, "benchmarks")})
  assert not table["rows"][0]["apart"]


def test_page_shows_benchmarks_faults_and_recipes_that_differ(tmp_path):
  write_facts(tmp_path, "benchmarks")
  write_scores(tmp_path, "sft", 0.68)
  write_scores(tmp_path, "ppo", 0.16, frames=8, unjudged=3)
  page = write_report(tmp_path).read_text()
  part = page[page.index('id="benchmarks"') : page.index('id="curves"')]
  assert "<h3>chair</h3>" in part and "0.680" in part
  assert "PPO: 3 unjudged" in part and "frames is 12 and 8" in part


def test_judges_stand_in_a_table_for_each_set_of_pairs(tmp_path):
  judged = {"accuracy": stat(0.75, 0.1), "tied": {"mean": 0.0}}
  sets = {"pairs": 603, "videos": 55, "judges": {"grm": judged, "reward_model": {}}}
  write_json(tmp_path / "judges/results.json", {"truth": sets, "note": "x"})
  (table,) = collect_judges(tmp_path / "judges")
  assert table["title"].startswith("603 pairs") and table["measures"][0] == "accuracy"
  assert table["rows"] == {
    "grm": ["75.0 % [65.0, 85.0]", "0.0 %"],
    "reward_model": ["not measured"] * 2,
  }
