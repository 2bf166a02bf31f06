"""Several processes: what is whose, what all know, and errors that all learn of."""

import json
import types

import jax
import numpy as np
import pytest

from tests.helpers import several
from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import common

X, Y = several.line()

# What each process prints: a line of JSON.
PROGRAM = """
import json, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from tests.helpers import several
from vlmrlaif_jax.core import distributed, sharding

coordinator, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
distributed.connect_processes(
  coordinator, processes, process, heartbeat_s=60, start_s=120
)
number = distributed.process_index()


def met(run):
  try:
    run()
  except Exception as error:
    return f"{type(error).__name__}: {error}"


X, Y = several.line()


def fail_on(wanted):
  assert number != wanted, "a cat"


@jax.jit
def step(w, x, y):
  loss, slope = jax.value_and_grad(lambda w: ((x @ w - y) ** 2).mean())(w)
  return loss, w - 0.1 * slope


def learned(devices, **sizes):
  mesh = sharding.make_mesh(**sizes, devices=devices)
  rows = distributed.local_rows(len(X), mesh)
  x, y = sharding.shard_batch((X[rows], Y[rows]), mesh)
  w, losses = sharding.replicate(np.zeros(3, np.float32), mesh), []
  for _ in range(3):
    loss, w = step(w, x, y)
    losses.append(float(loss))
  return {"rows": rows, "x": distributed.fetch_arrays(x), "losses": losses}


devices = np.array(jax.devices())
turns = devices.reshape(processes, -1).T.ravel()
mesh = sharding.make_mesh(data=2, fsdp=-1)
tensor = sharding.make_mesh(data=1, fsdp=1, tensor=-1)
rows = distributed.local_rows(8, mesh)
batch = sharding.shard_batch(np.arange(8)[rows] * 10, mesh)
whole = sharding.replicate(np.arange(3.0), mesh)
asked = []
square = lambda items: [asked.append(i) or i * i for i in items]
spread = distributed.map_across_processes(square, range(5))
multihost_utils.sync_global_devices("before telling")
print(json.dumps({
  "first": distributed.is_process_zero(),
  "rows": rows.tolist(),
  "rows_beside_tensor": distributed.local_rows(8, tensor).tolist(),
  "own_shards": sorted({int(x) for s in batch.addressable_shards for x in s.data}),
  "fetched": distributed.fetch_arrays({"a": batch, "b": whole, "c": 1}),
  "sum": float(jax.jit(lambda x, y: x.sum() + y[0])(batch, np.ones(2))),
  "shared": distributed.allgather_json(lambda: {"from": number}),
  "long": len(distributed.allgather_json(lambda: "x" * (3000 * number))[-1]),
  "once": distributed.on_process_zero(lambda: f"made by {number}"),
  "spread": spread,
  "asked": asked,
  "agreed": [distributed.any_process(False), distributed.any_process(number == 1)],
  "error": met(lambda: distributed.allgather_json(lambda: fail_on(1))),
  "nested": met(
    lambda: distributed.on_process_zero(lambda: distributed.any_process(True))
  ),
  "fetched_alone": met(
    lambda: distributed.on_process_zero(lambda: distributed.fetch_arrays(batch))
  ),
  "same": met(lambda: distributed.check_same_config("a")),
  "differs": met(lambda: distributed.check_same_config(str(number % 2))),
  "turns": learned(turns),
  "backwards": learned(devices[::-1], data=2),
  "ring": learned(np.roll(devices, 1), fsdp=4, tensor=2),
  "after": distributed.allgather_json(lambda: number),  # Errors leave no state.
}, default=lambda x: x.tolist()), flush=True)
"""


@pytest.fixture(scope="module", params=[2, 4])
def told(request, tmp_path_factory):
  """What each of several processes found, of 8 devices in all."""
  folder = tmp_path_factory.mktemp("hosts")
  (folder / "program.py").write_text(PROGRAM)
  count = request.param
  command = lambda at, i: [str(folder / "program.py"), at, str(count), str(i)]
  started = several.start(command, count, folder, devices=8 // count)
  several.finish(started, folder, limit_s=240)
  lines = [several.said(folder, i).splitlines() for i in range(count)]
  return [json.loads(next(x for x in said if x.startswith("{"))) for said in lines]


def test_each_process_has_its_own_rows_and_together_they_have_all(told):
  assert sum((each["rows"] for each in told), []) == list(range(8))
  for each in told:
    assert each["own_shards"] == [row * 10 for row in each["rows"]]


def test_processes_that_tensor_splits_have_the_same_rows(told):
  assert all(each["rows_beside_tensor"] == list(range(8)) for each in told)


# Of row shards of two rows each; of a process's devices none need stand together.
HELD = {
  2: {
    "turns": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "backwards": [[4, 5, 6, 7], [0, 1, 2, 3]],
  },
  4: {
    "turns": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "backwards": [[6, 7], [4, 5], [2, 3], [0, 1]],
  },
}


@pytest.mark.parametrize("order", ["turns", "backwards"])
def test_each_process_has_the_rows_of_its_devices_in_whatever_order(told, order):
  for each, held in zip(told, HELD[len(told)][order], strict=True):
    assert each[order]["rows"] == [row for i in held for row in (2 * i, 2 * i + 1)]


def test_rows_that_two_processes_work_on_are_read_by_both(told):
  shards = lambda each: [row // 4 for row in each["ring"]["rows"][::4]]
  of_two, of_four = [[0, 1, 2], [0, 2, 3]], [[0, 1], [1, 2], [2, 3], [0, 3]]
  assert [shards(each) for each in told] == (of_two if len(told) == 2 else of_four)


@pytest.mark.parametrize("order", ["turns", "backwards", "ring"])
def test_a_batch_and_its_losses_are_those_of_one_process_in_any_order(told, order):
  want, w = [], np.zeros(3)
  for _ in range(3):
    errors = X @ w - Y
    want.append((errors**2).mean())
    w = w - 0.1 * 2 * errors @ X / len(X)
  for each in told:
    np.testing.assert_array_equal(np.array(each[order]["x"], np.float32), X)
    np.testing.assert_allclose(each[order]["losses"], want, rtol=1e-5)


def test_what_is_fetched_is_whole_on_all(told):
  whole = {"a": [row * 10 for row in range(8)], "b": [0, 1, 2], "c": 1}
  assert all(each["fetched"] == whole for each in told)


def test_a_jitted_function_takes_what_is_the_same_on_all_hosts(told):
  assert {each["sum"] for each in told} == {281.0}


def test_what_each_makes_is_on_all(told):
  made = [{"from": i} for i in range(len(told))]
  assert all(each["shared"] == made for each in told)
  assert all(each["long"] == 3000 * (len(told) - 1) for each in told)


def test_what_is_made_once_is_made_by_the_first(told):
  assert {each["once"] for each in told} == {"made by 0"}
  assert [each["first"] for each in told] == [True] + [False] * (len(told) - 1)


def test_what_is_spread_is_asked_once_and_known_to_all(told):
  assert all(each["spread"] == [0, 1, 4, 9, 16] for each in told)
  asked = sum((each["asked"] for each in told), [])
  assert sorted(asked) == list(range(5)) and all(each["asked"] for each in told)


def test_one_flag_is_enough_for_all(told):
  assert all(each["agreed"] == [False, True] for each in told)


def test_an_error_of_one_is_raised_on_all_and_leaves_nothing_behind(told):
  count = len(told)
  assert told[1]["error"] == "AssertionError: a cat"
  others = {each["error"] for each in told[:1] + told[2:]}
  assert others == {f"HostError: process 1 of {count} failed: AssertionError: a cat"}
  assert all(each["after"] == list(range(count)) for each in told)


@pytest.mark.parametrize("name", ["nested", "fetched_alone"])
def test_a_collective_of_one_process_alone_is_an_error_of_all(told, name):
  first, *others = [each[name] for each in told]
  assert first.startswith("RuntimeError: distributed.")
  assert all(
    "process 0" in each and "waits for every process" in each for each in others
  )


def test_processes_that_were_started_differently_are_refused(told):
  assert {each["same"] for each in told} == {None}
  (error,) = {each["differs"] for each in told}
  assert "the config of processes [1" in error and "the same command" in error


def test_a_process_reads_the_videos_of_its_own_rows_alone(monkeypatch):
  read = []

  def stack(videos):
    read.extend(videos)
    return np.zeros((len(read), 1, 1, 1), np.float16)

  monkeypatch.setattr(distributed, "local_rows", lambda count, mesh: np.array([1, 3]))
  monkeypatch.setattr(sharding, "shard_batch", lambda batch, mesh: batch)
  examples = [{"video": f"{i}.mp4"} for i in range(6)]
  tokens = np.arange(6)[:, None]
  rows = tokenization.TokenRows(tokens, tokens > 0, tokens > 0, tokens[..., None])
  nothing = Run(**dict.fromkeys(Run._fields))
  run = nothing._replace(features=types.SimpleNamespace(stack=stack))
  monkeypatch.setattr(common, "batch_indices", lambda *given: np.array([5, 4, 3, 2]))
  batch = common.make_example_batch_fn(run, examples, rows, 4)(0)
  assert read == ["4.mp4", "2.mp4"]
  np.testing.assert_array_equal(batch.tokens, [[4], [2]])


# One process.


def test_one_process_has_all_rows_and_tells_itself():
  mesh = sharding.make_mesh(data=2, fsdp=2)
  np.testing.assert_array_equal(distributed.local_rows(4, mesh), np.arange(4))
  assert distributed.allgather_json(lambda: (1, 2)) == [(1, 2)]
  assert distributed.on_process_zero(
    lambda: 3
  ) == 3 and distributed.map_across_processes(list, [1, 2]) == [1, 2]
  assert distributed.is_process_zero() and not distributed.is_multiprocess()
  assert distributed.any_process(True) and not distributed.any_process(False)


@pytest.mark.parametrize(
  "around", [distributed.on_process_zero, distributed.allgather_json]
)
@pytest.mark.parametrize(
  "collective",
  [
    lambda: distributed.on_process_zero(int),
    lambda: distributed.map_across_processes(list, [1]),
    lambda: distributed.any_process(True),
    lambda: distributed.check_same_config("a"),
  ],
)
def test_what_waits_for_all_is_an_error_where_a_process_is_alone(around, collective):
  with pytest.raises(RuntimeError, match="waits for every process"):
    around(collective)
  assert distributed.any_process(True)  # The error has left nothing behind.


def test_what_needs_no_other_process_may_run_where_one_is_alone():
  assert distributed.on_process_zero(lambda: distributed.fetch_arrays({"a": 1})) == {
    "a": 1
  }
  assert distributed.on_process_zero(distributed.is_process_zero)


def test_one_process_meets_its_own_errors():
  with pytest.raises(ZeroDivisionError):
    distributed.on_process_zero(lambda: 1 // 0)


def test_fetch_takes_arrays_from_wherever_they_are():
  mesh = sharding.make_mesh(data=2, fsdp=2)
  batch = sharding.shard_batch(np.arange(4), mesh)
  got = distributed.fetch_arrays(
    {"spread": batch, "host": np.ones(2), "one": jax.numpy.ones(1)}
  )
  assert all(isinstance(x, np.ndarray) for x in got.values())
  np.testing.assert_array_equal(got["spread"], np.arange(4))


# Leaving after an error.


class Left(Exception):
  """In place of the end of this process."""


@pytest.fixture
def leave(monkeypatch, capsys):
  """(exit code, seconds waited, notes, stderr) of a process that leaves."""

  def run(error):
    slept, notes = [], []

    def end(code):
      raise Left(code)

    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    monkeypatch.setattr(distributed.os, "_exit", end)
    monkeypatch.setattr(distributed.os, "abort", lambda: end("abort"))
    with pytest.raises(Left) as left:
      distributed.abort_process(
        error, code=1, heartbeat_s=30, note=lambda: notes.append(error)
      )
    return left.value.args[0], slept, notes, capsys.readouterr().err

  return run


def test_who_has_met_an_error_notes_it_and_leaves(leave):
  code, slept, notes, said = leave(ValueError("a cat"))
  assert code == 1 and len(notes) == 1 and max(slept) < 5 and said == ""


@pytest.mark.parametrize(
  "text",
  [
    "NCCL operation ncclCommInitRank() failed: unhandled system error",
    "Gloo AllGather failed: Connection closed by peer",
  ],
)
def test_an_error_of_a_collective_is_one_if_all_live_after_a_heartbeat(leave, text):
  code, slept, notes, said = leave(RuntimeError(text))
  assert code == 1 and len(notes) == 1 and slept[0] == 50
  assert "no process has died" in said


def test_a_death_that_a_checkpoint_was_told_of_is_not_taken_for_an_own_error(leave):
  text = (
    "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 2 "
    "heartbeat timeout. This indicates that the remote task has failed"
  )
  code, slept, notes, _ = leave(RuntimeError(text))
  assert code == "abort" and slept == [50] and notes == []
