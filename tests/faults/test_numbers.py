"""Numbers that spoil a run: in weights, in rewards, in updates, in responses."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.faults import pipeline
from tests.helpers import small
from tests.stages.training.test_oracles import with_oracle
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import TrainState
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.stages.stage import get_stage
from vlmrlaif_jax.training import alarms, checkpoint


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_tensor_that_is_not_finite_is_named(tiny_checkpoint, tmp_path, value, dtype):
  folder = tmp_path / "base"
  shutil.copytree(tiny_checkpoint, folder)
  tensors = load_file(folder / "model.safetensors")
  (name,) = (name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
  tensors[name] = tensors[name].astype(jnp.dtype(dtype))
  save_file(tensors, folder / "model.safetensors")
  convert.load_checkpoint(folder)
  tensors[name][3, 5] = value
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(
    ValueError, match=f"model.safetensors: the tensor {name} contains"
  ):
    convert.load_checkpoint(folder)


def test_a_saved_step_that_is_not_finite_is_set_aside(tmp_path, monkeypatch, capsys):
  pipeline.install(monkeypatch)
  root = tmp_path / "run"
  runner.run_recipe(pipeline.config(), str(root))
  whole = pipeline.read_results(root)
  (root / "ppo" / "done.json").unlink()
  folder = root / "ppo" / "checkpoints"
  shutil.rmtree(folder / "3")
  x = np.full(400, np.nan, np.float32)
  spoilt = TrainState(np.int32(3), {"policy": {"x": x}}, np.zeros(300, np.float32))
  checkpoint.save_train_state(str(folder), spoilt, 3, keep=2)
  runner.run_recipe(pipeline.config(), str(root))
  assert pipeline.read_results(root) == whole
  line = f"{folder}/3 is damaged (policy/x contains NaN or infinity)"
  assert line in capsys.readouterr().out


# Stages of a model of random weights.

REWARD = "def score(samples):\n  return [{} for i in range(len(samples))]\n"


def make_run(one, workdir, reward):
  """A run whose reward is a Python expression of the response's index `i` alone."""
  run = with_oracle(one, workdir, kind="reward")
  (workdir / "rule.py").parent.mkdir(exist_ok=True)
  write_reward(run, reward)
  for name in ("reward_model", "stop"):
    run.config.reward.terms[name].weight = 0.0
  run.config.reward.terms.rule = {"fn": f"{workdir / 'rule.py'}:score"}
  for section in (run.config.ppo, run.config.grpo):
    section.update(steps=2, save_every=1, keep=3)
    section.optimizer.warmup_steps = 0
  run.config.ppo.update(minibatches=1, batch_size=4)
  return run


def write_reward(run, expression):
  (run.workdir / "rule.py").write_text(REWARD.format(expression))


def train(run, stage):
  """Runs a stage, from its last checkpoint; returns what it prints."""
  folder, screen = run.workdir / stage, io.StringIO()
  step = checkpoint.get_latest_step(str(folder / "checkpoints"))
  with StageLog(folder, stage, 3, resume_from=step, stream=screen) as log:
    get_stage(stage).run(run, stage, folder, log)
  return screen.getvalue()


def raised(run, stage):
  """(step, name) of each alarm."""
  path = run.workdir / stage / "alarms.jsonl"
  rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
  return [(row["step"], row["name"]) for row in rows]


def saved(run, stage):
  return checkpoint.list_steps(str(run.workdir / stage / "checkpoints"))


def test_equal_rewards_of_empty_responses_raise_alarms_at_the_second_step(
  one, tmp_path
):
  run = make_run(one, tmp_path / "run", "0.5")
  every = tuple(range(small.VOCAB))  # All tokens end a response.
  screen = train(run._replace(stops=every), "ppo")
  assert raised(run, "ppo") == [(2, "empty"), (2, "flat")]
  assert "all rewards were equal" in screen and "check that reward.terms" in screen
  assert "all responses" in screen and "read the samples" in screen


def test_equal_rewards_of_groups_raise_an_alarm_at_the_second_step(one, tmp_path):
  run = make_run(one, tmp_path / "run", "0.5")
  run.config.grpo.truncated_responses = "keep"
  screen = train(run, "grpo")
  assert (2, "flat") in raised(run, "grpo") and "rewards of each group" in screen


def test_rewards_that_are_not_finite_end_the_run_at_the_good_step(one, tmp_path):
  run = make_run(one, tmp_path / "run", "i if i else float('inf')")
  train(run, "ppo")  # Some cost only their responses.
  lines = small.metrics(run.workdir / "ppo")
  assert [line["invalid"] for line in lines] == [1, 1]
  assert all(np.isfinite(line["loss"]) and not line["skipped"] for line in lines)
  write_reward(run, "float('nan')")
  run.config.ppo.steps = 3
  with pytest.raises(UserError, match="(?s)4 of 4 samples have no score.*returned nan"):
    train(run, "ppo")
  assert saved(run, "ppo") == [1, 2]
  write_reward(run, "i")
  train(run, "ppo")
  assert saved(run, "ppo") == [1, 2, 3]


def test_a_reward_model_that_is_not_finite_ends_the_run(one, tmp_path, monkeypatch):
  run = make_run(one, tmp_path / "run", "i")
  run.config.reward.terms.reward_model.weight = 1.0
  real = checkpoint.restore_saved_params

  def spoil(path, like, step=None):
    return jax.tree.map(lambda x: x * jnp.nan, real(path, like, step))

  monkeypatch.setattr(checkpoint, "restore_saved_params", spoil)
  with pytest.raises(UserError, match="reward_model: the score is nan"):
    train(run, "ppo")
  assert saved(run, "ppo") == []


def test_a_learning_rate_that_explodes_stops_before_the_step_is_saved(one, tmp_path):
  run = make_run(one, tmp_path / "run", "i")
  run.config.ppo.optimizer.learning_rate = 1e3
  with pytest.raises(alarms.AlarmError, match="lower optimizer.learning_rate"):
    train(run, "ppo")
  assert raised(run, "ppo")[0] == (1, "jump") and saved(run, "ppo") == []
