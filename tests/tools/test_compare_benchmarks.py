"""tools/compare_benchmarks.py: two results, and what differs in how they were made."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = {"frames": 50, "judge": {"name": "endpoint", "version": "m-1"}}


@pytest.fixture
def compare(tmp_path):
  def write(name, mean, recipe):
    (tmp_path / name).mkdir()
    rows = [(f"{name}{i}" if i == 3 else f"{i}", mean + i) for i in range(4)]
    lines = [json.dumps({"id": id, "video": id, "values": {"detail": value}})
             for id, value in rows]  # fmt: skip
    (tmp_path / name / "rows.jsonl").write_text("\n".join(lines))
    stat = {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 7}
    told = {"scores": {"detail": stat}, "counts": {"unparsed": 2}, "recipe": recipe}
    (tmp_path / name / "scores.json").write_text(json.dumps(told))

  write("a", 2.5, RECIPE)
  write("b", 3.0, RECIPE)
  judge = {"name": "endpoint", "version": "m-2", "max_tokens": 9}
  write("c", 3.0, {"frames": 8, "judge": judge})

  def run(*given):
    command = [sys.executable, ROOT / "tools" / "compare_benchmarks.py", *given]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

  return run


def test_scores_and_counts_stand_side_by_side(compare):
  lines = [line.split() for line in compare("a", "b").stdout.splitlines()]
  assert lines[0] == ["a", "b", "B", "-", "A"]
  assert lines[1][0] == "detail" and lines[1][1] == "2.500" and "3.000" in lines[1]
  assert lines[2:] == [["unparsed", "2", "2"]]


def test_difference_is_of_the_cases_that_both_have(compare):
  line = compare("a", "b").stdout.splitlines()[1]
  assert line.endswith("0.500 [0.500, 0.500] of 3")


def test_difference_of_ratios_is_of_their_sums(compare, tmp_path):
  for name, rows in {"a": [(1.0, 1), (0.0, 3)], "b": [(0.5, 2), (0.0, 0)]}.items():
    lines = [
      json.dumps({"id": i, "video": str(i), "values": {"detail": value},
                  "weights": {"detail": weight}})
      for i, (value, weight) in enumerate(rows)
    ]  # fmt: skip
    (tmp_path / name / "rows.jsonl").write_text("\n".join(lines))
  assert " 0.250 [" in compare("a", "b").stdout.splitlines()[1]  # 1/2 - 1/4.


def test_each_entry_that_differs_is_named(compare):
  said = [line for line in compare("a", "c").stdout.splitlines() if "warning" in line]
  assert said == [
    "warning: frames differs: 50 in A, 8 in B",
    "warning: judge.version differs: 'm-1' in A, 'm-2' in B",
    "warning: judge.max_tokens differs: None in A, 9 in B",
  ]


def test_a_result_that_is_not_there_is_named(compare):
  assert "no none/scores.json" in compare("a", "none").stderr
