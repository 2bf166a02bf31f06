"""Measures this machine's limits and compares predicted times with measured ones."""

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

from perf.random_arrays import make_random_arrays
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

_SIDE = 2048  # Rows and columns of a square matmul.
_MANY_TOKENS = 1024  # Tokens of a matmul in training.
_FEW_TOKENS = 4  # Tokens of a matmul in decoding.
_LONG_BYTES = 2**28  # Bytes of an array that exceeds the caches.
_ACTIVATION_BYTES = 2**22  # Bytes of an activation.
_ROUNDS = 3
# Fewest seconds of a measurement, so that other load affects all equally.
_MIN_SECONDS = 0.5


def measure_chip(config: ConfigDict, note: NoteFn) -> Chip:
  """Measures this machine as a chip, in float32 and on one of its devices.

  Args:
    config: A recipe's config, for the shapes of its policy.
    note: Receives a line with the results.
  """
  mesh = sharding.make_mesh(1, 1, 1, 1, devices=jax.devices()[:1])
  model = abstract_run.create_abstract_run(config, mesh).policy
  bandwidth = _measure_bandwidth(lambda x: 0.5 * x + 1.0, _LONG_BYTES)
  # The system has to find and clear the memory that a program newly allocates.
  x = jnp.ones(_LONG_BYTES // 4)
  add = jax.jit(lambda x: x + 1.0)
  allocation = time_mean(lambda: add(x)) / _LONG_BYTES - 2 / bandwidth
  small = jnp.ones(8)
  latency = time_mean(lambda: add(small))
  flops = _measure_matmul(_SIDE, _SIDE, _SIDE)
  model_flops = _measure_matmul(_MANY_TOKENS, model.llm.embed, model.llm.mlp)
  activations = _measure_bandwidth(nn.silu, _ACTIVATION_BYTES)
  host = Host(model_flops, _measure_weights(model), activations, max(allocation, 0.0))
  device, count = jax.devices()[0], len(jax.devices())
  memory = memory_lib.get_device_memory(device, count)
  note(
    f"this machine: {flops / 1e9:.0f} GFLOP/s in float32, {bandwidth / 1e9:.0f} GB/s, "
    f"{latency * 1e6:.0f} us a call; matmuls of the model {model_flops / 1e9:.0f} "
    f"GFLOP/s, or {host.weight_bandwidth / 1e9:.0f} GB/s for few tokens; activation "
    f"functions {activations / 1e9:.0f} GB/s; {allocation * 1e9:.2f} s to allocate a GB"
  )
  return Chip(flops, memory, bandwidth, bandwidth / 2, latency, host=host)


def _measure_matmul(rows: int, inner: int, columns: int) -> float:
  """Returns the FLOPs per second of a matmul."""
  x, y = jnp.ones((rows, inner)), jnp.ones((inner, columns))
  multiply = jax.jit(jnp.matmul)
  return 2 * rows * inner * columns / time_mean(lambda: multiply(x, y))


def _measure_weights(model: vlm.VLM) -> float:
  """Returns the bytes per second of the model's weights in matmuls of a few tokens."""
  embed, mlp = model.llm.embed, model.llm.mlp
  # More weights than this exceed the caches as well.
  max_count = _LONG_BYTES // (8 * embed * mlp)
  count = max(min(get_model_sizes(model).kernels // (2 * embed * mlp), max_count), 1)
  up = [jnp.full((embed, mlp), 0.01) for _ in range(count)]
  down = [jnp.full((mlp, embed), 0.01) for _ in range(count)]

  @jax.jit
  def work(x, up, down):
    for first, second in zip(up, down, strict=True):
      x = x @ first @ second
    return x

  x = jnp.ones((_FEW_TOKENS, embed))
  return 8 * count * embed * mlp / time_mean(lambda: work(x, up, down))


def _measure_bandwidth(function: Callable[[Long], Long], size: int) -> float:
  """Returns the bytes per second that a repeated in-place function reads and writes."""
  x, times = jnp.ones(size // 4), max(_LONG_BYTES // size, 2)
  work = jax.jit(
    lambda x: jax.lax.fori_loop(0, times, lambda _, x: function(x), x),
    donate_argnums=0,
  )

  def call() -> Long:
    nonlocal x
    x = work(x)
    return x

  return 2 * size * times / time_mean(call)


def time_mean(call: Callable[[], Any]) -> float:
  """Returns the mean seconds of repeated calls, after an untimed call."""
  jax.block_until_ready(call())
  start, runs = time.perf_counter(), 0
  while (taken := time.perf_counter() - start) < _MIN_SECONDS or runs < 3:
    jax.block_until_ready(call())
    runs += 1
  return taken / runs


def measure_stages(
  config: ConfigDict,
  target: Target,
  stages: Iterable[str],
  cache: pathlib.Path,
  note: NoteFn,
) -> list[JsonRow]:
  """Runs each function on random arrays and returns its predicted and measured times.

  In each round the machine is measured before and after the functions, because it may
  have other load. The prediction is the geometric mean of both.

  Args:
    config: A recipe's config.
    target: This machine.
    stages: Names of the stages.
    cache: Folder of compiled programs' results.
    note: Receives a line of progress.
  """
  rows = []
  for run, stage, compiled in plan.compile_stages(config, target, stages, cache, note):
    predict = lambda run=run, stage=stage, compiled=compiled: plan.plan_stage(
      run, stage, target._replace(chip=measure_chip(config, note)), compiled
    )
    calls = [_prepare_call(run, function) for function in stage.workload.functions]
    results: list[list[tuple[float, float]]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
      before = predict()
      taken = [_average_seconds(call) for call in calls]
      after = predict()
      for i, measured in enumerate(taken):
        both = [row["functions"][i]["seconds"] for row in (before, after)]
        results[i].append((math.prod(both) ** 0.5, measured))
    rows += [
      _summarize(stage.name, function.name, times)
      for function, times in zip(stage.workload.functions, results, strict=True)
    ]
  return rows


def _summarize(stage: str, function: str, times: list[tuple[float, float]]) -> JsonRow:
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


def _prepare_call(run, function: DeviceFunction) -> Callable[[], float]:
  """Returns a call that runs a function on random arrays and returns its seconds."""
  fixed = make_random_arrays(function.args())

  def call() -> float:
    args = fixed
    if function.state is not None:  # The function donates it.
      args = (jax.tree.map(jnp.copy, args[0]), *args[1:])
    jax.block_until_ready(args)
    with jax.set_mesh(run.mesh):
      start = time.perf_counter()
      jax.block_until_ready(function.call(*args))
      return time.perf_counter() - start

  return call


def _average_seconds(call: Callable[[], float]) -> float:
  """Returns the mean of the seconds that calls return, after an untimed call."""
  call()
  taken: list[float] = []
  while sum(taken) < _MIN_SECONDS or len(taken) < 3:
    taken.append(call())
  return statistics.mean(taken)


def format_table(rows: list[JsonRow]) -> str:
  """Formats predicted and measured times as Markdown, with the typical error."""
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
