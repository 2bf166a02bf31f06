"""Stages with absurd settings, and what is said of them."""

import io
import json
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from configs import sft
from tests.helpers import several, small
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.stages.training import ppo
from vlmrlaif_jax.training import alarms

ROOT = pathlib.Path(__file__).parents[2]


def names(folder):
  rows = (folder / "alarms.jsonl").read_text().splitlines()
  return [json.loads(row)["name"] for row in rows]


def test_ppo_at_a_learning_rate_of_1000_leaves_its_reference(one, tmp_path):
  config = ConfigDict(one.config)
  config.ppo.steps = 3
  config.ppo.optimizer.learning_rate = 1e3
  config.ppo.alarms.stop = ("kl",)  # Not "jump", which stops the first step.
  run, folder, screen = one._replace(config=config), tmp_path / "ppo", io.StringIO()
  with StageLog(folder, "ppo", 3, stream=screen) as log:
    with pytest.raises(alarms.AlarmError, match="raise kl_coef"):
      ppo.train(run, "ppo", folder, log)
  assert "kl" in names(folder) and "ppo: ALARM kl at step" in screen.getvalue()


def test_a_run_that_an_alarm_ends_exits_with_a_code_of_its_own(tiny_settings, tmp_path):
  sections = sft.tiny()  # Those that the recipe has.
  absurd = {
    **{k: v for k, v in tiny_settings.items() if k.split(".")[0] in sections},
    "sft.optimizer.learning_rate": 1e30,
    "sft.optimizer.schedule": "constant",
  }
  line = ["launch/run.py", "--config=configs/sft.py", f"--workdir={tmp_path}/run"]
  done = subprocess.run(
    [sys.executable, *line, *small.flags(absurd)],
    cwd=ROOT, env=several.environment(4), capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == alarms.EXIT_ALARM
  assert "error: sft_short was stopped at step 1 by the alarm nan" in done.stderr
  assert names(tmp_path / "run" / "sft_short") == ["nan", "jump"]
