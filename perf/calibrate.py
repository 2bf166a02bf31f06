"""Predictions held against the clock: what this machine can do, and what it does."""

import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from perf.random_arrays import random_arrays
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.planner import abstract_run, plan
from vlmrlaif_jax.planner import memory as memory_lib
from vlmrlaif_jax.planner.flops import get_model_sizes
from vlmrlaif_jax.planner.plan import NoteFn, Target
from vlmrlaif_jax.planner.topologies import Chip, Host
from vlmrlaif_jax.runtime.workloads import DeviceFunction

Long = Float[Array, " long"]

_SIDE = 2048  # Of matrices that are multiplied,
_MANY, _FEW = 1024, 4  # tokens that go through those of a layer,
_LONG = 2**28  # bytes that do not stay in a cache,
_LAYER = 2**22  # and those of an activation.
_ROUNDS = 3
_LEAST = 0.5  # Seconds that each measurement takes: all of them meet other work alike.


def chip(config: ConfigDict, note: NoteFn) -> Chip:
  """This machine's own devices as a chip, measured; in float32, and one at a time."""
  mesh = sharding.make_mesh(1, 1, 1, 1, devices=jax.devices()[:1])
  model = abstract_run.create_abstract_run(config, mesh).policy
  bandwidth = _rate(lambda x: 0.5 * x + 1.0, _LONG)
  # What is new to a program has to be found and cleared by the system first.
  x = jnp.ones(_LONG // 4)
  add = jax.jit(lambda x: x + 1.0)
  fresh = seconds(lambda: add(x)) / _LONG - 2 / bandwidth
  small = jnp.ones(8)
  latency = seconds(lambda: add(small))
  flops = _products(_SIDE, _SIDE, _SIDE)
  own = _products(_MANY, model.llm.embed, model.llm.mlp)
  host = Host(own, _through(model), _rate(nn.silu, _LAYER), max(fresh, 0.0))
  device, count = jax.devices()[0], len(jax.devices())
  memory = memory_lib.get_device_memory(device, count)
  note(
    f"this machine: {flops / 1e9:.0f} GFLOP/s in float32, {bandwidth / 1e9:.0f} GB/s, "
    f"{latency * 1e6:.0f} us a call; through matrices as the model's {own / 1e9:.0f} "
    f"GFLOP/s, or {host.weights / 1e9:.0f} GB/s where tokens are few; through an "
    f"activation function {host.handed / 1e9:.0f} GB/s; {fresh * 1e9:.2f} s for a GB "
    "that is new"
  )
  return Chip(flops, memory, bandwidth, bandwidth / 2, latency, host=host)


def _products(rows: int, inner: int, columns: int) -> float:
  """Operations a second."""
  x, y = jnp.ones((rows, inner)), jnp.ones((inner, columns))
  multiply = jax.jit(jnp.matmul)
  return 2 * rows * inner * columns / seconds(lambda: multiply(x, y))


def _through(model: vlm.VLM) -> float:
  """Bytes a second of as many weights as the model's, each read for a few tokens."""
  embed, mlp = model.llm.embed, model.llm.mlp
  most = _LONG // (8 * embed * mlp)  # Larger models leave the cache, too.
  count = max(min(get_model_sizes(model).kernels // (2 * embed * mlp), most), 1)
  up = [jnp.full((embed, mlp), 0.01) for _ in range(count)]
  down = [jnp.full((mlp, embed), 0.01) for _ in range(count)]

  @jax.jit
  def work(x, up, down):
    for first, second in zip(up, down, strict=True):
      x = x @ first @ second
    return x

  x = jnp.ones((_FEW, embed))
  return 8 * count * embed * mlp / seconds(lambda: work(x, up, down))


def _rate(function: Callable[[Long], Long], size: int) -> float:
  """Bytes a second, read and written through so many, again and again in place."""
  x, times = jnp.ones(size // 4), max(_LONG // size, 2)
  work = jax.jit(
    lambda x: jax.lax.fori_loop(0, times, lambda _, x: function(x), x),
    donate_argnums=0,
  )

  def call() -> Long:
    nonlocal x
    x = work(x)
    return x

  return 2 * size * times / seconds(call)


def seconds(call: Callable[[], Any]) -> float:
  """The mean of as many runs as there is time for, after one that is not counted."""
  jax.block_until_ready(call())
  start, runs = time.perf_counter(), 0
  while (taken := time.perf_counter() - start) < _LEAST or runs < 3:
    jax.block_until_ready(call())
    runs += 1
  return taken / runs


def measure(
  config: ConfigDict,
  to: Target,
  stages: Iterable[str],
  cache: pathlib.Path,
  note: NoteFn,
) -> list[JsonRow]:
  """A row for each function, run on random arrays: seconds predicted and measured.

  Several times; in each, what the machine can do is measured before and after, for it
  may have other work, and the prediction is the mean of both.
  """
  rows = []
  for run, stage, compiled in plan.compile_stages(config, to, stages, cache, note):
    predict = lambda run=run, stage=stage, compiled=compiled: plan.plan_stage(
      run, stage, to._replace(chip=chip(config, note)), compiled
    )
    calls = [_prepared(run, function) for function in stage.workload.functions]
    found: list[list[tuple[float, float]]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
      before = predict()
      taken = [_mean(call) for call in calls]
      after = predict()
      for i, measured in enumerate(taken):
        both = [row["functions"][i]["seconds"] for row in (before, after)]
        found[i].append((math.prod(both) ** 0.5, measured))
    rows += [
      _compared(stage.name, function.name, times)
      for function, times in zip(stage.workload.functions, found, strict=True)
    ]
  return rows


def _compared(stage: str, function: str, times: list[tuple[float, float]]) -> JsonRow:
  predicted, measured = (statistics.median(each) for each in zip(*times, strict=True))
  ratios = sorted(measured / predicted for predicted, measured in times)
  return {
    "stage": stage,
    "function": function,
    "fits": True,
    "predicted": predicted,
    "measured": measured,
    "ratios": ratios,
  }


def _prepared(run, function: DeviceFunction) -> Callable[[], float]:
  """Runs a function on random arrays; returns the seconds that it took."""
  args = random_arrays(function.args())

  def call() -> float:
    given = args
    if function.state is not None:  # It is donated.
      given = (jax.tree.map(jnp.copy, args[0]), *args[1:])
    jax.block_until_ready(given)
    with jax.set_mesh(run.mesh):
      start = time.perf_counter()
      jax.block_until_ready(function.call(*given))
      return time.perf_counter() - start

  return call


def _mean(call: Callable[[], float]) -> float:
  """Of seconds that runs say they took, as `seconds`."""
  call()
  taken: list[float] = []
  while sum(taken) < _LEAST or len(taken) < 3:
    taken.append(call())
  return statistics.mean(taken)


def table(rows: list[JsonRow]) -> str:
  """Predictions and measurements as Markdown, and the error of all."""
  lines = []
  middle = [statistics.median(row["ratios"]) for row in rows]
  for row, ratio in zip(rows, middle, strict=True):
    lines.append(
      [
        row["stage"],
        row["function"],
        f"{row['predicted']:.3g}",
        f"{row['measured']:.3g}",
        f"**{ratio:.2f}** ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})",
      ]
    )
  head = ["stage", "function", "predicted, s", "measured, s", "measured / predicted"]
  typical = math.exp(statistics.mean(abs(math.log(ratio)) for ratio in middle))
  return "\n".join(
    [markdown_table(lines, head), "", f"Typically off by a factor of {typical:.2f}."]
  )
