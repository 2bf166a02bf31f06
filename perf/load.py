"""How fast a checkpoint is loaded, and how much memory that takes.

  python perf/load.py DIR [nf4|nf4_double|int8]

Writes a language model of about 2 GB and a small tower into DIR, loads both straight
into shards on this machine's devices, and tells the peak of the memory of the process
twice: over what it held before and the shards, and over what it holds in the end. A
model of the same shape but few layers is loaded before, so that neither counts the
compiler. DIR is removed afterwards.
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
from vlmrlaif_jax.models import clip, llama, vlm
from vlmrlaif_jax.models.projector import Projector

SHAPE = dict(vocab=32_000, embed=2048, mlp=5504, heads=16, kv_heads=16)
LAYERS = dict(small=1, large=16)


def write(folder: pathlib.Path, layers: int) -> None:
  """Random weights in bfloat16, in files of at most 1 GB."""
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


def memory() -> int:
  """Of this process, now, in bytes."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> None:
  if len(argv) not in (2, 3) or pathlib.Path(argv[1]).exists():
    raise app.UsageError("give one folder that does not exist yet")
  folder, quant = pathlib.Path(argv[1]), argv[2] if len(argv) == 3 else "none"
  try:
    # In a process of its own: what writing leaves behind is not to be measured.
    process = multiprocessing.get_context("spawn").Process
    for name, layers in LAYERS.items():
      writer = process(target=write, args=(folder / name, layers))
      writer.start()
      writer.join()
    measure(folder, quant)
  finally:
    shutil.rmtree(folder)


def measure(folder: pathlib.Path, quant: str) -> None:
  mesh = sharding.make_mesh()
  load = lambda name: convert.load_llava(
    folder / name, dtype="bfloat16", mesh=mesh, quant=quant, note=print
  )
  # Kept, and what the allocator has to spare given back: or the large model would be
  # put where the small one was, and seem to take less than it does.
  _kept = jax.block_until_ready(load("small")[1])
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  before, peak, done = memory(), [0], threading.Event()

  def watch():
    while not done.is_set():
      peak[0] = max(peak[0], memory())
      time.sleep(0.002)

  watcher = threading.Thread(target=watch)
  watcher.start()
  _, variables, _ = load("large")
  done.set()
  watcher.join()
  after, held = memory(), sum(x.nbytes for x in jax.tree.leaves(variables))
  files = tensor_files.open_folder(folder / "large").values()
  largest = max(file.nbytes for file in files)
  megabytes = lambda size: f"{size / 1e6:.0f} MB"
  over = lambda size: f"{megabytes(size)} = {size / largest:.2f} x the largest tensor"
  print(f"{mesh.size} devices; shards {megabytes(held)}, largest {megabytes(largest)}")
  told = zip(("before", "peak", "after"), (before, peak[0], after), strict=True)
  print("; ".join(f"{name} {megabytes(size)}" for name, size in told))
  print(f"peak - before - shards: {over(peak[0] - before - held)}")
  print(f"peak - after: {over(peak[0] - after)}")


if __name__ == "__main__":
  app.run(main)
