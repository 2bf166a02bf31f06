"""Predictions held against the clock: what this machine can do, and what it does."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vlmrlaif_jax import (
  plan_functions,
  plan_memory,
  plan_run,
  plan_stages,
  sharding,
)
from vlmrlaif_jax.plan import Note, Row, Target
from vlmrlaif_jax.topologies import Chip

_SIDE = 2048  # Of the matrices that are multiplied,
_LONG = 2**26  # and numbers that are read and written.


def chip(note: Note) -> Chip:
  """This machine's own devices as a chip, measured; in float32, and one at a time."""
  x = jnp.ones((_SIDE, _SIDE))
  multiply = jax.jit(lambda x: x @ x)
  add = jax.jit(lambda x: x + 1.0)
  long = jnp.ones(_LONG)
  small = jnp.ones(8)
  flops = 2 * _SIDE**3 / seconds(lambda: multiply(x))
  bandwidth = 2 * _LONG * 4 / seconds(lambda: add(long))
  latency = seconds(lambda: add(small), repeats=50)
  device, count = jax.devices()[0], len(jax.devices())
  memory = plan_memory.device_memory(device, count)
  note(
    f"this machine: {flops / 1e9:.0f} GFLOP/s in float32, {bandwidth / 1e9:.1f} GB/s, "
    f"{latency * 1e6:.0f} us a call"
  )
  return Chip(flops, memory, bandwidth, bandwidth / 2, latency)


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
  """The median of some runs, after one that is not counted."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times[1:])


def measure(
  config: ConfigDict,
  to: Target,
  stages: Iterable[str],
  predicted: list[Row],
  note: Note,
) -> list[Row]:
  """A row for each function, run on random arrays: seconds predicted and measured."""
  mesh = sharding.make_mesh(**config.mesh, devices=to.devices)
  run, rows = plan_run.make(config, mesh), []
  for stage, row in zip(
    plan_stages.of_recipe(run, list(stages)), predicted, strict=True
  ):
    for function, expected in zip(stage.functions, row["functions"], strict=True):
      note(f"{stage.name}: measuring {function.name}")
      with jax.set_mesh(mesh):
        taken = statistics.median(_timed(function, repeats=4))
      rows.append(
        {
          "stage": stage.name,
          "function": function.name,
          "fits": True,
          "predicted": expected["seconds"],
          "roofline": sum(p["roofline"] for p in expected["phases"]),
          "measured": taken,
        }
      )
  return rows


def _timed(function: plan_functions.Function, repeats: int) -> Iterator[float]:
  """Seconds of each run but the first, which compiles; state is donated anew."""
  args = random_like(function.args())
  for number in range(repeats):
    given = args
    if function.state is not None:
      given = (jax.tree.map(jnp.copy, args[0]), *args[1:])
    jax.block_until_ready(given)
    start = time.perf_counter()
    jax.block_until_ready(function.call(*given))
    if number:
      yield time.perf_counter() - start


def random_like(tree: PyTree) -> PyTree:
  """Arrays of these shapes: small numbers, real tokens, no video tokens among them."""
  rng = np.random.default_rng(0)

  def make(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.device_put(jax.random.key(0), x.sharding)
    if x.dtype == bool:
      value = np.ones(x.shape, bool)
    elif jnp.issubdtype(x.dtype, jnp.integer):
      value = np.asarray(rng.integers(3, 60, x.shape))
    else:
      value = np.asarray(0.02 * rng.normal(size=x.shape))
    return jax.device_put(value.astype(x.dtype), x.sharding)

  return jax.tree.map(make, tree)


def table(rows: list[Row]) -> str:
  """Predictions and measurements as Markdown, and the error of all."""
  lines = [
    "| stage | function | at the limit, s | predicted, s | measured, s | ratio |",
    "|---|---|---|---|---|---|",
  ]
  ratios = [row["measured"] / row["predicted"] for row in rows]
  for row, ratio in zip(rows, ratios, strict=True):
    lines.append(
      f"| {row['stage']} | {row['function']} | {row['roofline']:.4g} "
      f"| {row['predicted']:.4g} | {row['measured']:.4g} | {ratio:.2f} |"
    )
  typical = math.exp(statistics.mean(abs(math.log(ratio)) for ratio in ratios))
  return "\n".join([*lines, "", f"Typically off by a factor of {typical:.2f}."])
