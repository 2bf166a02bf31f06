"""Measures speed with random weights: python launch/bench.py --size=tiny --peer.

Prints a table in Markdown, and writes a line of JSON for each thing measured. See
docs/benchmarks.md.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402

SIZE = flags.DEFINE_enum("size", "tiny", ["tiny", "7b"], "Of the model.")
BASE = flags.DEFINE_enum("base", "bf16", ["bf16", "nf4", "int8"], "Its frozen kernels.")
WHAT = flags.DEFINE_list("what", "load,sft,decode", "What to measure.")
PEER = flags.DEFINE_bool("peer", False, "Also transformers and PEFT, in PyTorch.")
RANK = flags.DEFINE_integer("rank", 64, "Of the LoRA update.")
ATTENTION = flags.DEFINE_string("attention", "", "xla, cudnn (GPU) or splash (TPU).")
ROWS = flags.DEFINE_integer("rows", None, "Of a step of fine-tuning.")
TIME = flags.DEFINE_integer("time", None, "Tokens of each of them.")
BATCHES = flags.DEFINE_list("batches", None, "Rows that are decoded together.")
SCRATCH = flags.DEFINE_string("scratch", "runs/bench", "Gets the checkpoint to load.")
OUT = flags.DEFINE_string("out", "runs/bench.json", "Gets a line for each row.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  # On a CPU that has other work, PyTorch's threads, each waiting for the others in a
  # loop, are many times slower than they need to be.
  os.environ.setdefault("OMP_WAIT_POLICY", "passive")
  from vlmrlaif_jax import bench, bench_model

  given = dict(rows=ROWS.value, time=TIME.value)
  given["batches"] = BATCHES.value and tuple(map(int, BATCHES.value))
  given = {name: value for name, value in given.items() if value is not None}
  asked = bench_model.Bench(
    name=SIZE.value,
    size=bench_model.SIZES[SIZE.value]._replace(**given),
    base=BASE.value,
    what=tuple(WHAT.value),
    peer=PEER.value,
    rank=RANK.value,
    attention=ATTENTION.value,
    scratch=pathlib.Path(SCRATCH.value),
  )
  out, rows = pathlib.Path(OUT.value), []
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open("w") as file:
    for row in bench.measure(asked):
      file.write(json.dumps(row) + "\n")
      file.flush()
      rows.append(row)
  print(bench.table(rows))


if __name__ == "__main__":
  app.run(main)
