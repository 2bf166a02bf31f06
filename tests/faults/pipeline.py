"""A pipeline of toy stages in the real runner: checkpoints, logs, outputs, report."""

import json

import jax
import numpy as np

from tests.helpers import small
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.types import TrainState
from vlmrlaif_jax.data.pipeline import Splits
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.stages.labeling import pairwise
from vlmrlaif_jax.stages.stage import get_stage
from vlmrlaif_jax.training import checkpoint

STAGES = ("sft_long", "label", "rm", "ppo", "eval")
STEPS = 3


def config(**settings):
  return small.config({"data.prompt_len": 64}, STAGES, **settings)


def train(run, stage, folder, log):
  """Counts to STEPS, with a checkpoint, metrics and samples of each step."""
  path = str(folder / "checkpoints")
  start = TrainState(
    np.int32(0), {"policy": {"x": np.zeros(400, np.float32)}}, np.zeros(300, np.float32)
  )
  is_new = checkpoint.get_latest_step(path) is None
  state = start if is_new else checkpoint.restore_checkpoint(path, to_jax(start))
  x = np.asarray(state.params["policy"]["x"])
  for step in range(int(state.step) + 1, STEPS + 1):
    x = x * np.float32(0.5) + np.float32(step)
    log.log_metrics(step, {"loss": float(x.mean())})
    log.write_samples(
      step, [{"id": "a", "prompt": "p", "response": str(step), "video": ""}]
    )
    saved = TrainState(
      np.int32(step), {"policy": {"x": x}}, np.full(300, step, np.float32)
    )
    checkpoint.save_train_state(path, saved, step, keep=2)
    run.watch.check(f"step {step}")
  return {"last": float(x.mean())}


def to_jax(state):
  return jax.tree.map(jax.numpy.asarray, state)


def label(run, stage, folder, log):
  rows = [{"id": str(i), "output_1": "yes" * 9, "output_2": "no"} for i in range(9)]
  jsonl.write_records(folder / "preferences.jsonl", rows)
  write_json(folder / "rates.json", pairwise.compute_label_rates([]))
  log.log_metrics(1, {"kept": 1.0})
  return {"prompts": 9}


def evaluate(run, stage, folder, log):
  run.watch.check("nothing yet")
  write_json(folder / "results.json", {})
  jsonl.write_records(folder / "answers.jsonl", [{"id": "a", "answer": "b"}] * 3)
  run.watch.check("all rows")
  return {"rows": 3}


PARTS = {"label": label, "eval": evaluate}


def install(monkeypatch, parts=PARTS):
  """Makes the runner run the toy stages, without models and data."""

  def make_run(config, workdir, watch):
    nothing = [None] * (len(runner.Run._fields) - 2)
    return runner.Run(config, workdir, *nothing)._replace(splits=Splits(), watch=watch)

  def make_stage(name):
    run = parts.get(name, train)
    return get_stage(name)._replace(run=run, steps="", total_steps=lambda run: STEPS)

  monkeypatch.setattr(runner, "get_stage", make_stage)
  monkeypatch.setattr(runner.loading, "create_run", make_run)


def read_results(root):
  """All files of a workdir by name, without times, the page and Orbax's metadata."""
  results = {}
  for path in root.rglob("*"):
    name = str(path.relative_to(root))
    if not path.is_file() or "tensorboard" in name or "damaged" in name:
      continue
    if path.name == "metrics.jsonl":
      lines = path.read_bytes().splitlines()
      results[name] = [_drop_times(line) for line in lines if line]
    elif path.name in ("done.json", "stage.json"):
      results[name] = _drop_times(path.read_bytes())
    elif "checkpoints/" not in name and path.suffix != ".html":
      results[name] = path.read_bytes()
  return results | {  # The parameters are in the summaries of the stages.
    str(path.relative_to(root)): b"" for path in root.glob("*/checkpoints/*")
  }


def _drop_times(content):
  try:
    value = json.loads(content)
  except ValueError:
    return content
  times = ("time", "seconds", "started", runner.MEASURED)
  return {k: x for k, x in value.items() if k not in times}


def read_params(folder):
  """The parameters of a checkpoint."""
  like = {"policy": {"x": jax.numpy.zeros(400)}}
  return checkpoint.restore_saved_params(str(folder.parent), like, int(folder.name))
