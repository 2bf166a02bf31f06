"""The loop, over a method of one number: what happens when, and after a restart."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import small
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.interrupts import NO_MONITOR
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Collector, Loss, Method, offline
from vlmrlaif_jax.training import alarms, checkpoint, loop
from vlmrlaif_jax.training.job import NO_HOOKS, Hooks, TrainingJob, TrainingSchedule
from vlmrlaif_jax.training.update import default_config, init_state, make_update

ROWS, STEPS = 16, 5
TX = optax.adam(0.1)


def loss(params, frozen, rows):
  error = params["x"] - frozen["pull"] * rows
  return Loss(jnp.mean(error**2), jnp.float32(len(rows)), {"mean": jnp.mean(rows)})


@jax.jit
def noise(key, params, frozen, rows):
  """Rows that depend on the step's key."""
  return rows + jax.random.normal(key, rows.shape)


def as_it_is(params, frozen, rows, phase):
  return rows, {"pull": frozen["pull"], "rows": rows}


noisy = Collector(noise, as_it_is)


def mesh():
  return sharding.make_mesh(data=4, fsdp=1)


def data(step):
  rows = np.arange(ROWS, dtype=np.float32) + 10 * step
  return sharding.shard_batch(rows, mesh())


def run(
  folder,
  *,
  collect=noisy,
  update=None,
  hooks=NO_HOOKS,
  watch=NO_MONITOR,
  **plan,
):
  """Trains in a folder, from its checkpoint if it has one."""
  plan = TrainingSchedule(**{"steps": STEPS, "save_every": 1, **plan})
  state = sharding.replicate(init_state({"x": jnp.float32(0)}, TX), mesh())
  at = checkpoint.get_latest_step(f"{folder}/checkpoints")
  with StageLog(folder, "toy", plan.steps, resume_from=at, stream=io.StringIO()) as log:
    state, samplers = loop.restore_training(log, state, plan)
    return loop.run_training(
      TrainingJob(
        method=Method(jax.Array, collect, loss),
        params=state.params,
        frozen={"pull": jnp.float32(1)},
        batch_spec=None,
        schedule=plan,
        optimizer=default_config(),
        passes={},
        alarms=alarms.default_config(),
        hooks=hooks,
        data=data,
      ),
      update or jax.jit(make_update(loss, TX)),
      state,
      samplers,
      key=jax.random.key(7),
      log=log,
      watch=watch,
    )


class Killed(Exception):
  pass


def killed_at(step):
  def on_step(now, batch, info):
    if now == step:
      raise Killed
    return {}

  return Hooks(after_step=on_step)


def by_params(key, params, frozen, rows):
  """Rows that depend on the step's key and on the parameters that sample."""
  return rows + params["x"] * jax.random.normal(key, rows.shape) + params["x"]


def test_sampling_and_the_order_of_minibatches_share_no_key(tmp_path, monkeypatch):
  sampling, orders, iterate = [], [], loop._iterate_minibatches

  def sample(key, params, frozen, rows):
    sampling.append(key)
    return rows

  def iterate_and_keep(experience, key, plan):
    orders.append(key)
    return iterate(experience, key, plan)

  monkeypatch.setattr(loop, "_iterate_minibatches", iterate_and_keep)
  run(tmp_path, collect=Collector(sample, as_it_is), minibatches=4)
  data = [str(jax.random.key_data(key)) for key in [*sampling, *orders]]
  assert len({*data}) == len(data) == 2 * STEPS


OFF, TWO_OFF = {"max_staleness": 1}, {"max_staleness": 2}


@pytest.mark.parametrize("killed", [1, 3, 4])
@pytest.mark.parametrize(
  "plan",
  [
    {},
    {"epochs": 2, "minibatches": 4},
    OFF,
    {**OFF, "minibatches": 4},
    TWO_OFF,
    {"max_staleness": 3, "minibatches": 4},
    {"max_staleness": 9},
  ],
)
def test_resumed_equals_uninterrupted(tmp_path, plan, killed):
  plan = {"collect": Collector(jax.jit(by_params), as_it_is), **plan}
  whole = run(tmp_path / "whole", **plan)
  every = 1 if killed == 1 else 2
  with pytest.raises(Killed):
    run(tmp_path / "killed", hooks=killed_at(killed), save_every=every, **plan)
  saved = checkpoint.get_latest_step(str(tmp_path / "killed/checkpoints"))
  assert saved == {1: 1, 3: 2, 4: 4}[killed]
  resumed = run(tmp_path / "killed", save_every=2, **plan)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  lines = small.metrics(tmp_path / "whole")
  assert small.metrics(tmp_path / "killed") == lines
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_finished_stage_does_nothing_more(tmp_path):
  first = run(tmp_path)
  again = run(tmp_path, update=lambda *args: pytest.fail("it updated"))
  np.testing.assert_array_equal(first.params["x"], again.params["x"])
  assert len(small.metrics(tmp_path)) == STEPS


def test_every_row_is_seen_once_in_each_pass(tmp_path):
  seen = []

  def update(state, frozen, rows):
    seen.append(np.asarray(rows))
    return state._replace(step=state.step + 1), {}

  run(tmp_path, collect=offline, update=update, steps=2, epochs=3, minibatches=4)
  assert len(seen) == 2 * 3 * 4
  passes = np.reshape(seen, (2, 3, ROWS))
  for step in range(2):
    np.testing.assert_array_equal(
      np.sort(passes[step], axis=1), [np.arange(ROWS) + 10.0 * step] * 3
    )
  assert len({tuple(row) for row in passes[0]}) == 3  # Each pass in its own order.


@pytest.mark.parametrize("plan", [{}, {"epochs": 2, "minibatches": 2}])
def test_experience_is_spread_over_the_devices_as_data_is(tmp_path, plan):
  def replicated(key, params, frozen, rows):
    return jax.device_put(rows + 1, NamedSharding(mesh(), PartitionSpec()))

  seen = []

  def update(state, frozen, rows):
    seen.append(rows.sharding.shard_shape(rows.shape))
    return state._replace(step=state.step + 1), {}

  run(tmp_path, collect=Collector(replicated, as_it_is), update=update, steps=1, **plan)
  part = ROWS // plan.get("minibatches", 1)
  assert set(seen) == {(part // 4,)}


@pytest.mark.parametrize("plan", [{}, OFF, TWO_OFF])
def test_hooks_change_what_is_frozen_for_a_rollout_and_add_metrics(tmp_path, plan):
  hooks = Hooks(
    before_step=lambda step, params: {"pull": jnp.float32(step + 2)},
    after_step=lambda step, batch, info: {"told": float(step)},
  )
  run(tmp_path, hooks=hooks, steps=3, **plan)
  lines = small.metrics(tmp_path)
  assert [line["pull"] for line in lines] == [2, 3, 4]
  assert [line["told"] for line in lines] == [0, 1, 2]


def test_numbers_of_info_are_logged_and_arrays_are_not(tmp_path):
  told = []
  on_step = lambda step, batch, info: told.append(info) or {}
  run(tmp_path, hooks=Hooks(after_step=on_step), steps=1)
  (line,) = small.metrics(tmp_path)
  assert {"pull", "loss", "mean", "grad_norm"} < set(line) and "rows" not in line
  assert told[0]["rows"].shape == (ROWS,)


def test_saves_at_every_nth_step_and_the_last(tmp_path, monkeypatch):
  saved = []
  monkeypatch.setattr(
    loop.checkpoint,
    "save_train_state",
    lambda path, state, step, **more: saved.append((step, more)),
  )
  run(tmp_path, save_every=2, keep=3)
  assert [step for step, _ in saved] == [2, 4, 5]
  assert saved[1][1] == {"keep": 3}


def test_logs_every_nth_step_and_the_last(tmp_path):
  run(tmp_path, log_every=3, save_every=5)
  assert [line["step"] for line in small.metrics(tmp_path)] == [3, 5]


# One step off.


def counted(state, frozen, rows):
  """An update that adds 1."""
  params = {"x": state.params["x"] + 1}
  return state._replace(step=state.step + 1, params=params), {}


def by_policy(params, frozen, rows, phase):
  return rows, {"sampled_by": params["x"] + 0}  # The update may donate params.


@pytest.mark.parametrize(
  "staleness, sampled_by",
  [
    (0, [0, 1, 2, 3, 4]),
    (1, [0, 0, 1, 2, 3]),
    (2, [0, 0, 0, 1, 2]),
    (3, [0, 0, 0, 0, 1]),
    (9, [0, 0, 0, 0, 0]),
  ],
)
def test_a_rollout_is_of_the_policy_so_many_updates_before(
  tmp_path, staleness, sampled_by
):
  collect = Collector(noise, by_policy)
  update = jax.jit(counted, donate_argnums=0)
  run(tmp_path, collect=collect, update=update, max_staleness=staleness)
  lines = small.metrics(tmp_path)
  assert [line["sampled_by"] for line in lines] == sampled_by
  told = [line.get("staleness", 0) for line in lines]
  assert told == [step - at for step, at in enumerate(sampled_by)]
  assert all(("staleness" in line) == bool(staleness) for line in lines)


def test_staleness_counts_updates(tmp_path):
  run(tmp_path, minibatches=4, **TWO_OFF)
  assert [line["staleness"] for line in small.metrics(tmp_path)] == [0, 4, 8, 8, 8]


def test_the_next_rollout_is_scored_after_the_update_was_given_to_the_device(tmp_path):
  seen = []

  def begin(key, params, frozen, rows):
    seen.append("sample")
    return rows

  def finish(params, frozen, rows, phase):
    seen.append("score")
    return rows, {}

  def update(state, frozen, rows):
    seen.append("update")
    return counted(state, frozen, rows)

  run(tmp_path, collect=Collector(begin, finish), update=update, steps=3, **OFF)
  first, rest = ["sample", "score"], ["sample", "update", "score"]
  assert seen == [*first, *rest, *rest, "update"]


def test_as_many_rollouts_are_in_flight_as_the_setting_says(tmp_path):
  seen, in_flight = [], set()

  def begin(key, params, frozen, rows):
    in_flight.add(int(rows[0]) // 10)
    return rows

  def finish(params, frozen, rows, phase):
    seen.append(sorted(in_flight))
    in_flight.remove(int(rows[0]) // 10)
    return rows, {}

  run(tmp_path, collect=Collector(begin, finish), **TWO_OFF)
  assert seen == [[0, 1], [1, 2], [2, 3], [3, 4], [4]]


# Phases.


def test_every_line_says_what_took_how_long(tmp_path):
  run(tmp_path, steps=2)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  for line in map(json.loads, lines):
    assert {"data", "sample", "prepare", "update", "log", "idle"} <= set(line["phases"])
