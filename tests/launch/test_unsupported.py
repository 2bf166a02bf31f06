"""Checkpoints of other models are refused by name, before anything is estimated."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import chats, several, small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.planner import abstract_run, memory
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.serving import chat_session

ROOT = pathlib.Path(__file__).parents[2]
TYPES = (
  "qwen3_5", "qwen3_vl_moe", "qwen2_vl", "llava_next_video", "internvl",
  "internvl_chat",
)  # fmt: skip
NO_TOWER = "language model without a vision tower.*--config.model.tower"


def write(folder, model_type, *, weights=True):
  """A folder without a tokenizer."""
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
  if weights:
    save_file({"x": np.ones(2, np.float32)}, folder / "model.safetensors")
  return folder


def check(folder, world, tmp_path, named):
  """Runs, plans and opens a folder, none of which may get far."""
  config = small.config(small.settings(folder, world), ppo__batch_size=8)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(memory, "estimate_memory", None)
    with pytest.raises(UserError, match=named):
      runner.run_recipe(config, str(tmp_path / "run"))
  with pytest.raises((ValueError, FileNotFoundError), match=named):
    abstract_run.find_configs(config)
  model = run_lib.default_config()
  with pytest.raises((ValueError, FileNotFoundError), match=named):
    chat_session.open_model(
      str(folder), model, chats.mesh(), max_prompt=64, note=lambda line: None
    )


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_other_models_are_refused_by_name(tiny_world, tmp_path, model_type, weights):
  folder = write(tmp_path / "model", model_type, weights=weights)
  check(folder, tiny_world, tmp_path, f"model_type must be .* got '{model_type}'")


def test_a_language_model_without_a_tower_is_refused(tiny_world, tmp_path):
  check(write(tmp_path / "model", "qwen2"), tiny_world, tmp_path, NO_TOWER)


def test_the_planner_gives_no_advice_about_another_model(tiny_world, tmp_path):
  folder = write(tmp_path / "model", "qwen2_vl")
  done = subprocess.run(
    [sys.executable, "launch/plan.py", "--config=configs/ppo.py", "--topology=v5e-4",
     f"--config.model.path={folder}"],
    cwd=ROOT, env=several.environment(), capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2 and "got 'qwen2_vl'" in done.stderr
  assert "--sweep" not in done.stderr and "memory" not in done.stderr
