"""Alarms in the loop: on disk, on the screen, after a restart."""

import io
import json
import math

import jax.numpy as jnp
import pytest

from tests.training import test_loop as toy
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.training import alarms, checkpoint

CLIPPED = [0.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0, 0.9]  # Begins at the steps 2 and 8.


def config(**settings):
  made = alarms.default_config()
  made.update(window=2, clip=0.4)
  made.update(settings)
  return made


def train(folder, steps, *, resume_from=None, writes=True, screen=None, **settings):
  """What a loop would do with the metrics of the steps; what it is told to show."""
  screen = io.StringIO() if screen is None else screen
  last = resume_from or 0
  given = dict(resume_from=resume_from, writes=writes, stream=screen)
  with StageLog(folder, "toy", len(CLIPPED), **given) as log:
    bells = alarms.AlarmLog(config(**settings), log, last)
    shown = []
    for step in range(last + 1, steps + 1):
      log.log_metrics(step, {"clip_fraction": CLIPPED[step - 1]})
      shown.append(bells.update(step, {"clip_fraction": CLIPPED[step - 1]}))
  return shown


def lines(folder):
  return [json.loads(x) for x in (folder / "alarms.jsonl").read_text().splitlines()]


def test_each_onset_is_a_line_of_alarms_jsonl(tmp_path):
  train(tmp_path, 8)
  found = [(line["step"], line["name"]) for line in lines(tmp_path)]
  assert found == [(2, "clip"), (8, "clip")]
  assert list(lines(tmp_path)[0]) == ["step", "name", "message", "remedy"]


def test_it_is_shown_once_and_the_progress_line_says_while_it_holds(tmp_path):
  screen = io.StringIO()
  shown = train(tmp_path, 5, screen=screen)
  assert screen.getvalue().count("toy: ALARM clip at step") == 1
  assert "lower optimizer.learning_rate" in screen.getvalue()
  assert "ALARM clip" in shown and shown[0] == shown[4] == ""


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_resumed_run_neither_loses_nor_repeats_alarms(tmp_path, cut):
  train(tmp_path / "whole", 8)
  # It was killed two steps after its checkpoint.
  train(tmp_path / "cut", min(cut + 2, 8))
  train(tmp_path / "cut", 8, resume_from=cut)
  assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_of_several_processes_one_writes(tmp_path):
  train(tmp_path, 8)
  before = (tmp_path / "alarms.jsonl").stat().st_mtime_ns
  train(tmp_path, 8, resume_from=4, writes=False)
  assert (tmp_path / "alarms.jsonl").stat().st_mtime_ns == before


def test_no_file_is_made_without_an_alarm(tmp_path):
  train(tmp_path, 1)
  assert not (tmp_path / "alarms.jsonl").exists()


def test_an_alarm_ends_the_run_if_it_is_to(tmp_path):
  told = "toy was stopped at step .* by the alarm clip: .*lower optimizer.learning_rate"
  with pytest.raises(alarms.AlarmError, match=told):
    train(tmp_path, 8, stop=("clip",))
  assert len(lines(tmp_path)) == 1


# In the loop.


def halves(count, values):
  """An update whose metrics are those of the values, in turn."""
  left = iter(values)

  def update(state, frozen, rows):
    state = state._replace(step=state.step + 1)
    return state, {"loss": jnp.float32(next(left)), "sampler_gap": jnp.float32(count)}

  return update


def test_what_is_not_finite_in_any_update_of_a_step_is_told_of(tmp_path):
  update = halves(0.0, [1.0, 1.0, math.nan, 1.0])
  with pytest.raises(alarms.AlarmError, match="step 2 by the alarm nan: loss is nan"):
    toy.run(tmp_path, update=update, steps=2, minibatches=2)


def test_the_step_of_an_alarm_that_stops_is_not_saved(tmp_path):
  update = halves(0.0, [1.0, 1.0, math.nan])
  with pytest.raises(alarms.AlarmError):
    toy.run(tmp_path, update=update, steps=3)
  assert checkpoint.get_latest_step(str(tmp_path / "checkpoints")) == 2


def test_the_gap_to_the_sampler_is_that_of_the_first_update(tmp_path):
  gaps = iter([0.25, 9.0])

  def update(state, frozen, rows):
    return state._replace(step=state.step + 1), {"sampler_gap": jnp.float32(next(gaps))}

  toy.run(tmp_path, update=update, steps=1, minibatches=2)
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert line["sampler_gap"] == 0.25
  assert lines(tmp_path)[0]["name"] == "gap"


def test_a_gap_that_is_of_an_older_policy_is_not_told(tmp_path):
  update = halves(9.0, [1.0] * 3)
  toy.run(tmp_path, update=update, steps=3, max_staleness=1)
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert ["sampler_gap" in json.loads(row) for row in rows] == [True, False, False]


def test_defaults_hold_where_no_settings_are_given(tmp_path):
  with pytest.raises(alarms.AlarmError):
    toy.run(tmp_path, update=halves(0.0, [math.inf]), steps=1)
