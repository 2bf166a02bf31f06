"""Measures how fast a checkpoint loads, and its peak memory.

  python perf/load.py DIR [nf4|nf4_double|int8]

It writes a language model of about 2 GB and a small vision tower into DIR. It loads
both as shards onto this machine's devices. It prints the peak memory of the process
above two levels: its memory before loading plus the shards, and its memory afterwards.
A model with few layers is loaded first, so that the compiler counts in neither. DIR is
removed afterwards.
"""

import ctypes
import multiprocessing
import os
import pathlib
import shutil
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.huggingface import (
  checkpoint_layouts,
  convert,
  param_mapping,
  tensor_files,
)
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.projector import Projector

SHAPE = dict(vocab=32_000, embed=2048, mlp=5504, heads=16, kv_heads=16)
LAYERS = dict(small=1, large=16)


def write_checkpoint(folder: pathlib.Path, layers: int) -> None:
  """Writes random weights in bfloat16, in files of at most 1 GB."""
  llm = llama.Model(**SHAPE, layers=layers, param_dtype="bfloat16")
  model = vlm.VLM(clip.VisionTower(**clip.VARIANTS["tiny"]), Projector(llm.embed), llm)
  rng = np.random.default_rng(0)
  table = checkpoint_layouts.make_llava_table(*convert.get_model_types(model))
  shapes = param_mapping.get_hf_shapes(table, vlm.get_param_shapes(model))
  random = lambda shape: rng.integers(0, 2**14, shape, np.uint16).view(jnp.bfloat16)
  tensor_files.write_folder(
    folder, ((n, random(s)) for n, s in shapes.items()), limit=10**9
  )
  config = convert.make_llava_config(model, image_token=SHAPE["vocab"] - 1)
  write_json(folder / "config.json", config)


def get_memory() -> int:
  """Returns the resident bytes of this process."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> None:
  """Writes the checkpoints, measures, and removes them."""
  if len(argv) not in (2, 3) or pathlib.Path(argv[1]).exists():
    raise app.UsageError(f"DIR must be one folder that does not exist, got {argv[1:]}")
  folder, quant = pathlib.Path(argv[1]), argv[2] if len(argv) == 3 else "none"
  try:
    # A process of its own, so that memory left by writing is not measured.
    process = multiprocessing.get_context("spawn").Process
    for name, layers in LAYERS.items():
      writer = process(target=write_checkpoint, args=(folder / name, layers))
      writer.start()
      writer.join()
    measure(folder, quant)
  finally:
    shutil.rmtree(folder)


def measure(folder: pathlib.Path, quant: str) -> None:
  """Prints the memory of loading the large checkpoint of a folder."""
  mesh = sharding.make_mesh()
  load = lambda name: convert.load_checkpoint(
    folder / name, dtype="bfloat16", mesh=mesh, quant=quant, note=print
  )
  # The small model stays in memory and malloc_trim returns free pages. Otherwise the
  # large model would reuse its memory and seem smaller.
  _small = jax.block_until_ready(load("small")[1])
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  before, peak, done = get_memory(), [0], threading.Event()

  def watch():
    while not done.is_set():
      peak[0] = max(peak[0], get_memory())
      time.sleep(0.002)

  watcher = threading.Thread(target=watch)
  watcher.start()
  _, variables, _ = load("large")
  done.set()
  watcher.join()
  after, shards = get_memory(), sum(x.nbytes for x in jax.tree.leaves(variables))
  files = tensor_files.open_folder(folder / "large").values()
  largest = max(file.nbytes for file in files)
  megabytes = lambda size: f"{size / 1e6:.0f} MB"
  over = lambda size: f"{megabytes(size)} = {size / largest:.2f} x the largest tensor"
  print(
    f"{mesh.size} devices; shards {megabytes(shards)}, largest {megabytes(largest)}"
  )
  sizes = zip(("before", "peak", "after"), (before, peak[0], after), strict=True)
  print("; ".join(f"{name} {megabytes(size)}" for name, size in sizes))
  print(f"peak - before - shards: {over(peak[0] - before - shards)}")
  print(f"peak - after: {over(peak[0] - after)}")


if __name__ == "__main__":
  app.run(main)
