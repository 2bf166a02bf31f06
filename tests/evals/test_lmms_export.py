"""Answers in lmms-eval's log layout."""

import datetime
import json

import pytest

from vlmrlaif_jax.core.jsonl import read_jsonl, write_records
from vlmrlaif_jax.evals import lmms_export

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def result(tmp_path):
  """Two questions of a multiple choice, by letter and by generation; one unread."""
  folder = tmp_path / "runs" / "demo" / "benchmarks" / "videomme" / "ppo"
  case = lambda id, right, **values: {"id": id, "right": right, "values": values}
  rows = [case("letter:7", "B", letter_accuracy=1.0),
          case("letter:8", "C", letter_accuracy=0.0),
          case("generation:7", "B", generation_accuracy=1.0),
          case("generation:8", "C")]  # fmt: skip
  answers = [{"fingerprint": "x"}, {"id": "7", "question": "Q7", "text": "B."},
             {"id": "8", "question": "Q8", "text": "Dunno."}]  # fmt: skip
  stat = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 2}
  sampling = {"max_new": 9, "temperature": 0.2, "top_p": 1.0}
  recipe = {"sampling": sampling, "settings": {"durations": []}}
  write_records(folder / "rows.jsonl", rows)
  write_records(folder / "answers.jsonl", answers)
  told = {"scores": {"letter_accuracy": stat}, "recipe": recipe}
  (folder / "scores.json").write_text(json.dumps(told))
  return folder


def written(result, out):
  paths = lmms_export.write(result, out, "videomme", NOW)
  results, again = (json.loads(paths[i].read_text()) for i in (0, 2))
  return [str(p.relative_to(out)) for p in paths], results, read_jsonl(paths[1]), again


def test_files_are_named_for_model_date_and_task(result, tmp_path):
  names, *_ = written(result, tmp_path / "out")
  endings = ("results.json", "samples_videomme.jsonl", "videomme.json")
  assert names == [f"demo__ppo/20260102_030405_{ending}" for ending in endings]


def test_a_sample_has_its_answer_and_all_that_was_measured(result, tmp_path):
  _, _, rows, _ = written(result, tmp_path)
  assert [len(row.pop("doc_hash")) for row in rows] == [64, 64]
  assert rows == [
    {"doc_id": 0, "target": "B", "filtered_resps": "B.", "token_counts": [None],
     "letter_accuracy": 1.0, "generation_accuracy": 1.0, "input": "Q7"},
    {"doc_id": 1, "target": "C", "filtered_resps": "Dunno.", "token_counts": [None],
     "letter_accuracy": 0.0, "input": "Q8"},
  ]  # fmt: skip


def test_results_have_means_errors_and_the_recipe(result, tmp_path):
  _, found, _, _ = written(result, tmp_path)
  error = found["results"]["videomme"].pop("letter_accuracy_stderr,none")
  assert error == pytest.approx(0.5 / 2 / 1.96, rel=1e-4)
  assert found["results"] == {
    "videomme": {"alias": "videomme", "letter_accuracy,none": 0.5}}  # fmt: skip
  assert found["n-samples"]["videomme"] == {"original": 2, "effective": 2}
  config = found["configs"]["videomme"]
  settings = {"max_new_tokens": 9, "temperature": 0.2, "top_p": 1.0}
  assert config["generation_kwargs"] == settings | {"do_sample": True}
  assert config["metadata"]["settings"] == {"durations": []}


def test_from_log_finds_each_answer(result, tmp_path):
  """As lmms-eval's models/simple/from_log.py reads it."""
  _, _, _, log = written(result, tmp_path)
  assert log["args"]["limit"] is None and log["args"]["model"] == "vlmrlaif_jax"
  answers = {data["doc_id"]: data["resps"][0] for data in log["logs"]}
  assert [answers[i][0] for i in range(2)] == ["B.", "Dunno."]
  assert log["model_configs"]["task"] == "videomme"
  assert datetime.datetime.strptime(log["time"], "%m%d_%H%M").day == 2


def test_what_is_not_of_one_answer_each_is_refused(result, tmp_path):
  write_records(result / "rows.jsonl", [{"id": "detail:9", "right": "", "values": {}}])
  with pytest.raises(ValueError, match="detail:9 is of several answers"):
    lmms_export.write(result, tmp_path, "videomme", NOW)


def test_a_part_of_the_records_is_refused(result, tmp_path):
  told = json.loads((result / "scores.json").read_text())
  told["recipe"]["settings"]["durations"] = ["short"]
  (result / "scores.json").write_text(json.dumps(told))
  with pytest.raises(ValueError, match="is of some .'durations'. alone"):
    lmms_export.write(result, tmp_path, "videomme", NOW)


def test_what_has_not_been_run_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="scores.json: run configs/benchmarks.py"):
    lmms_export.write(tmp_path / "a" / "b" / "c" / "d", tmp_path, "videomme", NOW)


def test_commands_name_logs_task_and_checkpoint(tmp_path):
  said = lmms_export.commands(tmp_path, "videomme", "out/ppo")
  assert f"from_log --model_args logs={tmp_path} --tasks videomme" in said
  assert "llava_hf --model_args pretrained=out/ppo" in said
