"""Measures how fast a published language model loads, and how fast decoding compiles.

  python perf/load_real.py DIR

DIR is a folder that tests/helpers/real_model.py writes: SmolLM2-135M in float32, 30
layers. It is written if it does not exist. The first load of a process includes the
tracing of shapes, which later loads find in a cache. Seconds of the CPU count all
threads, and depend less on what else the machine does.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import app

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import loading
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.sampling.generate import generate

ROWS, PROMPT, NEW = 4, 64, 64  # Answers, and tokens of prompts and answers.


def measure(name: str, call: Callable[[], Any], size: int = 0) -> Any:
  """Returns the result of a call, and prints its seconds and GB per second."""
  start, cpu = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(call())
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  speed = f", {size / 1e9 / seconds:.2f} GB/s" if size else ""
  print(f"{name}: {seconds:.2f} s{speed}; {cpu:.2f} s of the CPU", flush=True)
  return result


def main(argv: list[str]) -> None:
  """Measures two loads, and lowering and compiling of greedy decoding."""
  if len(argv) != 2:
    raise app.UsageError(f"give one folder, got {argv[1:]}")
  folder = pathlib.Path(argv[1])
  if not folder.exists():
    from tests.helpers import real_model

    real_model.write_smollm2(folder)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  tower = str(run_lib.resolve_checkpoint("builtin:tiny") / "clip")
  size = (folder / "model.safetensors").stat().st_size
  settings = run_lib.default_config()
  settings.update(path=str(folder), tower=tower, lora_rank=0, lora_alpha=1.0)
  load = lambda: loading.load_model(settings, folder, mesh, note=print)[:2]
  loaded: list[Any] = []
  for name in ("first", "second"):
    loaded.clear()
    measure(f"{name} load", lambda: loaded.extend(load()) or loaded[1], size)
  model, variables = loaded
  vlm.get_variable_shapes.cache_clear()
  measure("tracing of shapes", lambda: vlm.get_param_shapes(model) and None)
  mask = np.ones((ROWS, PROMPT), bool)
  tokens = np.ones((ROWS, PROMPT), np.int32)
  positions = np.tile(np.arange(PROMPT, dtype=np.int32)[:, None], (ROWS, 1, 1))
  video = np.zeros((ROWS, 1, 1, model.vision.channels), np.float16)
  batch = Batch(video, tokens, mask, np.zeros_like(mask), positions)
  decode = functools.partial(
    generate, model, max_new=NEW, temperature=0.0, stops=(2,), pad=0
  )
  lower = functools.partial(jax.jit(decode).lower, variables, batch, jax.random.key(0))
  lowered: list[Any] = []
  measure("lowering of decode", lambda: lowered.append(lower()))
  measure("compiling of decode", lambda: lowered[0].compile() and None)


if __name__ == "__main__":
  app.run(main)
