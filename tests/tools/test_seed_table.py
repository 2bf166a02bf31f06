"""tools/seed_table.py over evaluations written by hand."""

import importlib.util
import json
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / "tools" / "seed_table.py"
SPEC = importlib.util.spec_from_file_location("table", PATH)
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)


def stat(mean):
  return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def policy(accuracy, words):
  return {
    "accuracy": stat(accuracy), "by_kind": {"false_premise": stat(accuracy)},
    "hallucination": stat(0.25), "words": stat(words),
  }  # fmt: skip


def workdir(folder, **policies):
  results = {
    "policies": policies, "pair": list(policies)[:2], "questions": 9, "videos": 3,
    "difference": {"accuracy": stat(0.125)},
  }  # fmt: skip
  (folder / "eval").mkdir(parents=True)
  (folder / "eval" / "results.json").write_text(json.dumps(results))
  return str(folder)


def test_seeds_share_a_row_with_their_mean_and_each(tmp_path, capsys):
  first = workdir(tmp_path / "a", sft=policy(0.5, 4), dpo_1=policy(0.75, 3))
  second = workdir(tmp_path / "b", sft=policy(0.25, 5), dpo_1=policy(0.5, 2))
  table.main(["--seeds", first, second])
  _, _, sft, dpo = capsys.readouterr().out.splitlines()
  assert sft.startswith("| sft | 37.5 (50.0, 25.0) | 37.5 (50.0, 25.0) | 25.0 (25.0")
  assert dpo.startswith("| dpo_1 | 62.5 (75.0, 50.0) |")
  assert dpo.endswith("|  |  | 2.5 (3.0, 2.0) |")  # Nothing else was measured.


def test_policies_that_a_seed_lacks_are_left_out(tmp_path, capsys):
  first = workdir(tmp_path / "a", sft=policy(0.5, 4), dpo_1=policy(0.75, 3))
  second = workdir(tmp_path / "b", sft=policy(0.25, 5))
  table.main(["--seeds", first, second])
  assert "dpo_1" not in capsys.readouterr().out


def test_a_workdir_without_a_reward_model_has_its_table(tmp_path, capsys):
  table.main([workdir(tmp_path / "a", sft=policy(0.5, 4), dpo=policy(0.75, 3))])
  said = capsys.readouterr().out
  assert "9 questions, 3 videos; no reward model" in said
  assert "| correct answers | 50.0 [40.0, 60.0] | 75.0 [65.0, 85.0] | 12.5" in said


def test_an_unfinished_workdir_is_named(tmp_path):
  with pytest.raises(SystemExit, match="the evaluation of .* has not finished"):
    table.main([str(tmp_path)])
