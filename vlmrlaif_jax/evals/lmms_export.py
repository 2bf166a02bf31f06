"""What the stage `benchmarks` found, as lmms-eval logs it with --log_samples.

The layout is lmms-eval 0.7.3's (loggers/evaluation_tracker.py): of one evaluation
DATE_results.json and DATE_samples_TASK.jsonl, in a folder that is named for the model.
Beside them stands DATE_TASK.json, in the layout that its model `from_log` reads: with
it lmms-eval scores our answers by its own rules and judges. Videos are pooled before
our language model, which its own LLaVA does not do; of images it can ask an exported
checkpoint itself.
"""

import datetime
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from vlmrlaif_jax.core.files import read_json, write_json
from vlmrlaif_jax.core.jsonl import read_jsonl, write_records

Row: TypeAlias = dict[str, Any]
SUBSETS = ("durations", "domains", "tasks")  # Of questions; see multiple_choice.
WIDTH = 2 * 1.959964  # Of a 95 % interval, in standard errors.
MODEL = "vlmrlaif_jax"


def write(
  result: pathlib.Path, out: pathlib.Path, task: str, now: datetime.datetime
) -> list[pathlib.Path]:
  """Writes the three files, and returns their paths.

  Args:
    result: a folder WORKDIR/benchmarks/NAME/POLICY.
    task: what lmms-eval calls the benchmark, such as "videomme". Its documents are to
      be the records of our file of questions, in their order.

  Raises:
    FileNotFoundError: the stage has not been run.
    ValueError: its cases have no answer of their own, or are not of all records.
  """
  told, answers, cases = read(result)
  name = f"{result.parents[2].name}/{result.name}"
  date = now.strftime("%Y%m%d_%H%M%S")
  folder = out / re.sub(r'["<>:/|\\?*\[\]]+', "__", name)
  rows = samples(answers, cases)
  paths = [
    folder / f"{date}_{ending}"
    for ending in ("results.json", f"samples_{task}.jsonl", f"{task}.json")
  ]
  write_records(paths[1], rows)
  found = results(task, name, told, rows) | {"date": date}
  write_json(paths[0], found)
  log = for_rescoring(task, name, rows) | {"time": now.strftime("%m%d_%H%M")}
  write_json(paths[2], log)
  return paths


def read(result: pathlib.Path) -> tuple[Row, list[Row], list[Row]]:
  """(scores.json, the answers, what became of each case) of a folder."""
  files = [result / name for name in ("scores.json", "answers.jsonl", "rows.jsonl")]
  for file in files:
    if not file.exists():
      raise FileNotFoundError(
        f"no {file}: run configs/benchmarks.py there, and of a multiple choice by "
        "generation"
      )
  told = read_json(files[0])
  parts = [key for key in SUBSETS if told["recipe"]["settings"].get(key)]
  if parts:
    raise ValueError(
      f"{result} is of some {parts} alone, and lmms-eval counts all records: measure "
      "on all of them"
    )
  return told, read_jsonl(files[1])[1:], read_jsonl(files[2])


def samples(answers: Sequence[Row], cases: Sequence[Row]) -> list[Row]:
  """A logged sample for each answer, with all that was measured of its question.

  A case's id is that of its answer, or that behind the way of answering: "letter:7".
  """
  of: dict[str, list[Row]] = {row["id"]: [] for row in answers}
  for case in cases:
    id = case["id"] if case["id"] in of else case["id"].partition(":")[2]
    if id not in of:
      raise ValueError(
        f"case {case['id']} is of several answers, which lmms-eval's log has no place "
        "for: export benchmarks whose cases are of one answer each"
      )
    of[id].append(case)
  return [_sample(i, row, of[row["id"]]) for i, row in enumerate(answers)]


def _sample(number: int, answer: Row, cases: Sequence[Row]) -> Row:
  values = {name: x for case in cases for name, x in case["values"].items()}
  target = next((case["right"] for case in cases if case["right"]), "")
  doc = json.dumps([answer["id"], answer["question"], target])
  return {
    "doc_id": number,
    "target": target,
    "filtered_resps": answer["text"],
    "token_counts": [None],
    "doc_hash": _hash(doc),  # Of what we know of their document.
    **values,
    "input": answer["question"],
  }


def results(task: str, model: str, told: Row, rows: Sequence[Row]) -> Row:
  """The means of an evaluation, with standard errors as wide as our intervals."""
  found: Row = {"alias": task}
  for name, stat in told["scores"].items():
    found[f"{name},none"] = stat["mean"]
    found[f"{name}_stderr,none"] = (stat["high"] - stat["low"]) / WIDTH
  sampling = told["recipe"]["sampling"]
  settings = {
    "max_new_tokens": sampling["max_new"],
    "temperature": sampling["temperature"],
    "top_p": sampling["top_p"],
    "do_sample": sampling["temperature"] > 0,
  }
  config = {
    "task": task,
    "output_type": "generate_until",
    "generation_kwargs": settings,
    "metadata": told["recipe"],
  }
  hashes = "".join(f"sample_{i}{row['doc_hash']}" for i, row in enumerate(rows))
  return {
    "results": {task: found},
    "group_subtasks": {task: []},
    "configs": {task: config},
    "versions": {task: "Yaml"},
    "n-shot": {task: 0},
    "higher_is_better": {task: {}},
    "n-samples": {task: {"original": len(rows), "effective": len(rows)}},
    "config": _args(model),
    "task_hashes": {task: _hash(hashes)},
    "model_source": MODEL,
    "model_name": model,
  }


def for_rescoring(task: str, model: str, rows: Sequence[Row]) -> Row:
  """What lmms-eval's `from_log` reads: the answers by document."""
  return {
    "args": _args(model),
    "model_configs": {"task": task},
    "logs": [
      {"doc_id": row["doc_id"], "resps": [[row["filtered_resps"]]]} for row in rows
    ],
  }


def _args(model: str) -> Mapping[str, Any]:
  return {"model": MODEL, "model_args": f"pretrained={model}", "limit": None}


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def commands(logs: pathlib.Path, task: str, checkpoint: str) -> str:
  """How lmms-eval scores our answers, and how it asks an exported checkpoint."""
  start, ending = "python -m lmms_eval --model", "--batch_size 1 --log_samples"
  return (
    f"to score these answers by lmms-eval's own rules:\n"
    f"  {start} from_log --model_args logs={logs} --tasks {task} {ending} "
    f"--output_path {logs}/scored\n"
    "to have it ask an exported checkpoint (launch/export.py) about images; its LLaVA "
    "takes no videos:\n"
    f"  {start} llava_hf --model_args pretrained={checkpoint} --tasks mme,mmbench_en "
    f"{ending} --output_path {logs}/asked"
  )
