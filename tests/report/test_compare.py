"""Runs beside each other: curves over each other, results, the same prompts."""

import json
import shutil

import pytest

from tests.helpers.made_run import (
  stat,
  write_facts,
  write_json,
  write_lines,
  write_run,
)
from vlmrlaif_jax.report.compare import collect_comparison, name_runs, write_comparison


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
  """A run, one of the same prompts that went on otherwise, and one of other videos."""
  folder = tmp_path_factory.mktemp("runs")
  first = write_run(folder / "first")
  second = folder / "second"
  shutil.copytree(first, second)
  config = json.loads((second / "config.json").read_text())
  config["ppo"]["kl_coef"] = 0.5
  write_json(second / "config.json", config)
  results = json.loads((second / "eval/results.json").read_text())
  results["held_out"]["policies"]["ppo"]["accuracy"] = stat(0.6, 0.02)
  write_json(second / "eval/results.json", results)
  answers = (second / "eval/answers.jsonl").read_text()
  (second / "eval/answers.jsonl").write_text(answers.replace("alert", "beep"))
  third = folder / "third"
  shutil.copytree(first, third)
  for path in (third / "world/videos").iterdir():
    path.write_bytes(path.read_bytes() + b"x")
  return [first, second, third]


@pytest.fixture(scope="module")
def two(roots):
  return collect_comparison(roots[:2])


def test_results_of_all_runs_stand_in_one_table(two):
  row = two["rows"][0]
  texts = ("69.5 % [66.8, 72.2]", "78.1 % [75.4, 80.8]", "60.0 % [58.0, 62.0]")
  assert [each["cells"] for each in row.values()] == [
    {"sft": texts[0], "ppo": texts[1]},
    {"sft": texts[0], "ppo": texts[2]},
  ]
  for each in row.values():
    assert each["label"] == "Correct answers" and each["better"] == "ppo"
    assert each["difference"] == "+8.6 [+5.9, +11.3]"


def test_a_run_without_an_evaluation_has_no_cells(roots, tmp_path):
  (tmp_path / "empty").mkdir()
  row = collect_comparison([tmp_path / "empty", roots[0]])["rows"][0]
  assert row["empty"]["cells"] == {} and len(row["first"]["cells"]) == 2


def test_benchmarks_have_a_column_for_each_policy_of_each_run(roots, tmp_path):
  runs = [tmp_path / name for name in ("a", "b")]
  for run in runs:
    write_facts(run, "benchmarks")
    told = {"scores": {"accuracy": stat(0.5, 0.1)}, "recipe": {"frames": 8}}
    write_json(run / "benchmarks/pope/ppo/scores.json", told)
  (table,) = collect_comparison(runs)["benchmarks"]
  assert table["columns"] == ["a · PPO", "b · PPO"] and table["differs"] == {}
  page = write_comparison(runs, tmp_path / "c.html").read_text()
  part = page[page.index('id="benchmarks"') : page.index('id="curves"')]
  assert "b · PPO" in part and "Difference" not in part


def test_curves_lie_over_each_other_on_one_axis(two):
  stage = next(stage for stage in two["stages"] if stage["name"] == "ppo")
  chart = stage["charts"][0]
  assert chart["title"] == "reward" and chart["shared"]
  assert [(line["name"], line["place"]) for line in chart["lines"]] == [
    ("first", 1),
    ("second", 2),
  ]
  assert chart["lines"][0]["ticks"] == chart["lines"][1]["ticks"]


def test_a_run_has_its_colour_where_another_has_no_curve(roots, tmp_path):
  (tmp_path / "empty").mkdir()
  stages = collect_comparison([tmp_path / "empty", roots[0]])["stages"]
  lines = [
    line for stage in stages for chart in stage["charts"] for line in chart["lines"]
  ]
  assert {(line["name"], line["place"]) for line in lines} == {("first", 2)}


def test_settings_that_differ_are_named(two):
  assert two["settings"] == {"ppo.kl_coef": [0.0625, 0.5]}


def test_answers_to_the_same_prompt_stand_together(two):
  source = next(s for s in two["samples"]["sources"] if s["name"] == "eval")
  group = source["groups"][0]
  assert [answer["name"] for answer in group["answers"]] == [
    "SFT of first, second",  # What is the same is told once.
    "PPO of first",
    "PPO of second",
  ]
  assert "beep" in group["answers"][2]["text"]


def test_sampled_answers_are_compared_at_the_same_step(two):
  source = next(s for s in two["samples"]["sources"] if s["name"] == "ppo")
  assert {group["step"] for group in source["groups"]} == set(range(0, 41, 5))
  for group in source["groups"]:
    first, second = group["answers"]
    assert first["name"].startswith("first") and second["name"].startswith("second")


def test_the_same_question_about_another_video_is_not_compared(roots):
  assert collect_comparison([roots[0], roots[2]])["samples"]["sources"] == []


def test_page_says_so_where_there_is_nothing_to_compare(roots, tmp_path):
  page = write_comparison([roots[0], roots[2]], tmp_path / "c.html").read_text()
  assert "no prompt in common" in page


def test_alarms_of_each_run_stand_at_the_top(roots, tmp_path):
  run = tmp_path / "alarmed"
  write_facts(run, "ppo")
  alarm = {"step": 4, "name": "KL explodes", "message": "9 nats.", "remedy": "Stop."}
  write_lines(run / "ppo/alarms.jsonl", [alarm])
  page = write_comparison([roots[0], run], tmp_path / "c.html").read_text()
  assert page.index("KL explodes") < page.index('id="result"')


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
  paths = [tmp_path / "a/run", tmp_path / "b/run"]
  assert name_runs(paths) == ["a/run", "b/run"]
  with pytest.raises(ValueError, match="the same workdir is given twice"):
    name_runs([tmp_path, tmp_path])


def test_one_run_or_too_many_are_refused(roots, tmp_path):
  with pytest.raises(ValueError, match="give 2 to 6 workdirs to compare, got 1"):
    write_comparison(roots[:1], tmp_path / "c.html")
  with pytest.raises(FileNotFoundError, match="nowhere"):
    write_comparison([roots[0], tmp_path / "nowhere"], tmp_path / "c.html")
