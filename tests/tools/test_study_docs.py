"""Tables and figures of a study, from results made up by hand."""

import json

import pytest

from tests.helpers.figures import check_figure
from tools import study_docs
from tools.study import Row, Score, Scores, Table

TABLE = Table(
  "size",
  "Sizes",
  "accuracy",
  (Row("before", "demo", "sft", "50.0"), Row("after", "demo", "ppo", "60.0")),
)

SCORES = Scores(
  "qa",
  "QA",
  "bench",
  ("sft", "ppo"),
  (Score("correct", "msvd_qa", "accuracy", paper=("67", "76")),),
)


def results(root, name, **accuracies):
  folder = root / name
  (folder / "eval").mkdir(parents=True)
  policies = {name: {"accuracy": {"mean": mean}} for name, mean in accuracies.items()}
  told = {"held_out": {"policies": policies}}
  (folder / "eval" / "results.json").write_text(json.dumps(told))
  (folder / "rm").mkdir()
  done = {"summary": {"held_out_accuracy": 0.9}}
  (folder / "rm" / "done.json").write_text(json.dumps(done))


def test_spread_is_students_interval():
  found = study_docs.compute_spread([1.0, 2.0, 3.0])
  assert found.mean == 2.0
  assert found.half == pytest.approx(4.302653 / 3**0.5, abs=1e-5)


def test_spread_of_one_seed_has_no_interval():
  assert study_docs.format_spread(study_docs.compute_spread([4.0])) == "4.0"


def test_gain_is_of_each_seed(tmp_path):
  results(tmp_path, "demo-0", sft=0.5, ppo=0.6)
  results(tmp_path, "demo-1", sft=0.7, ppo=0.8)
  last = study_docs.make_table(TABLE, tmp_path, (0, 1)).splitlines()[-1]
  assert (
    last == "| after | 70.0 (60.0, 80.0) | 90.0 (90.0, 90.0) | +10.0 ± 0.0 | 60.0 |"
  )


def test_sft_has_no_reward_model(tmp_path):
  results(tmp_path, "demo-0", sft=0.5, ppo=0.6)
  line = study_docs.make_table(TABLE, tmp_path, (0,)).splitlines()[2]
  assert line == "| before | 50.0 |  |  | 50.0 |"


def test_a_seed_that_is_missing_is_left_out(tmp_path):
  results(tmp_path, "demo-0", sft=0.5, ppo=0.6)
  last = study_docs.make_table(TABLE, tmp_path, (0, 1)).splitlines()[-1]
  assert last == "| after | 60.0 | 90.0 | +10.0 | 60.0 |"


def test_write_puts_table_and_figure_between_the_markers(tmp_path):
  results(tmp_path, "demo-0", sft=0.5, ppo=0.6)
  results(tmp_path, "more-0", ppo=0.7)
  results(tmp_path, "late-1", ppo=0.8)  # Of another seed.
  rows = (*TABLE.rows, Row("more", "more", "ppo"), Row("late", "late", "ppo"))
  path = tmp_path / "docs" / "results.md"
  path.parent.mkdir()
  path.write_text(
    "Above.\n<!-- study-size -->\nold\n<!-- end of study-size -->\nBelow."
  )
  study_docs.write(path, (TABLE._replace(rows=rows),), (), tmp_path, (0,))
  text = path.read_text()
  assert "old" not in text and "| more | 70.0 | 90.0 | +20.0 |  |" in text
  assert "| late |" not in text and "--only=demo,more,late" in text
  assert text.startswith("Above.") and text.endswith("Below.")
  check_figure(path.parent / "figures" / "study_size.png")


def test_write_leaves_a_table_of_one_arm_alone(tmp_path):
  results(tmp_path, "demo-0", sft=0.5, ppo=0.6)
  path = tmp_path / "results.md"
  path.write_text("As it was.")
  study_docs.write(path, (TABLE,), (SCORES,), tmp_path, (0,))
  assert path.read_text() == "As it was."


def test_benchmarks_are_told_before_and_after(tmp_path):
  for seed, (before, after) in enumerate([(0.5, 0.75), (0.25, 0.5)]):
    folder = tmp_path / f"bench-{seed}" / "eval"
    folder.mkdir(parents=True)
    means = {"sft": before, "ppo": after}
    policies = {name: {"accuracy": {"mean": mean}} for name, mean in means.items()}
    told = json.dumps({"msvd_qa": {"policies": policies}})
    (folder / "results.json").write_text(told)
  path = tmp_path / "results.md"
  path.write_text("<!-- study-qa -->\n<!-- end of study-qa -->")
  study_docs.write(path, (), (SCORES,), tmp_path, (0, 1))
  line = "| correct | 37.5 (50.0, 25.0) | 62.5 (75.0, 50.0) | +25.0 ± 0.0 | 67 -> 76 |"
  assert line in path.read_text()
