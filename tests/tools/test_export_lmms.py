"""tools/export_lmms.py: files of logs, and the commands that read them."""

import json
import pathlib
import subprocess
import sys

from vlmrlaif_jax.core.jsonl import write_records

ROOT = pathlib.Path(__file__).parents[2]


def run(*given):
  command = [sys.executable, ROOT / "tools" / "export_lmms.py", *given]
  return subprocess.run(command, capture_output=True, text=True)


def test_logs_and_commands_are_told(tmp_path):
  result = tmp_path / "demo" / "benchmarks" / "msvd_qa" / "sft"
  case = {"id": "a:1", "right": "dog", "values": {"accuracy": 1.0}}
  write_records(result / "rows.jsonl", [case])
  answer = {"id": "a:1", "question": "?", "text": "A dog."}
  write_records(result / "answers.jsonl", [{"fingerprint": "x"}, answer])
  sampling = {"max_new": 9, "temperature": 0.0, "top_p": 1.0}
  told = {"scores": {}, "recipe": {"sampling": sampling, "settings": {}}}
  (result / "scores.json").write_text(json.dumps(told))
  out = tmp_path / "logs"
  said = run(str(result), "--task=activitynetqa", f"--out={out}").stdout
  made = sorted(out.rglob("*.json*"))
  assert len(made) == 3 and all(str(path) in said for path in made)
  assert f"--model from_log --model_args logs={out} --tasks activitynetqa" in said


def test_a_result_that_is_not_there_is_named(tmp_path):
  done = run(str(tmp_path / "a" / "b" / "c"), "--task=x", f"--out={tmp_path}")
  assert done.returncode == 1 and "error: no " in done.stderr
