"""Measures speed with random weights: python perf/main.py --size=tiny.

With --trl and --tunix also that of other libraries, each by the Python of an
environment that holds it; --setup_peers=DIR makes these. Prints tables, and keeps a
line of JSON for each row in --out, which a second run goes on from. See
docs/benchmarks.md.
"""

import pathlib
import shlex
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

SIZE = flags.DEFINE_list("size", "tiny", "Some of tiny, 110m, 7b.")
BASE = flags.DEFINE_string("base", "none", "Quantised kernels: none, nf4 or int8.")
WHAT = flags.DEFINE_list(
  "what", "machine,sft,dpo,grpo,ppo,sample", "And load, curves (of the size tiny)."
)
PEERS = {
  "trl": flags.DEFINE_string("trl", "", "The Python of an environment with TRL."),
  "tunix": flags.DEFINE_string("tunix", "", "The Python of one with Tunix."),
}
PAIRS = flags.DEFINE_integer("pairs", 5, "Runs of which the median is taken.")
RANK = flags.DEFINE_integer("rank", 64, "Of the LoRA update.")
ATTENTION = flags.DEFINE_string("attention", "", "xla, cudnn (GPU) or splash (TPU).")
FRAMES = flags.DEFINE_list("frames", [], "Of each video; a row for each number.")
SET = flags.DEFINE_list("set", [], "Other fields of Size, as new=64,group=16.")
SCRATCH = flags.DEFINE_string("scratch", "runs/bench", "Gets the checkpoint to load.")
OUT = flags.DEFINE_string("out", "runs/bench.jsonl", "Rows; those in it stay.")
DOCS = flags.DEFINE_bool("write_docs", False, "Put the tables into docs/benchmarks.md.")
SETUP = flags.DEFINE_string("setup_peers", "", "Make the environments here, and end.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if SETUP.value:
    return setup_peers(pathlib.Path(SETUP.value))
  from perf import bench, docs, peer
  from vlmrlaif_jax.core.jsonl import append_jsonl, read_jsonl

  pythons = {name: flag.value for name, flag in PEERS.items() if flag.value}
  peers = peer.Peers(pythons, ROOT / "perf" / "peers")
  out = pathlib.Path(OUT.value)
  rows = read_jsonl(out) if out.exists() else []
  for asked in benches():
    # The curves are of a step that is short enough to take dozens of times.
    what = [w for w in WHAT.value if w != "curves" or asked.name == "tiny"]
    for row in bench.measure(asked, what, peers, pairs=PAIRS.value, done=rows):
      append_jsonl(out, [row])
      rows.append(row)
  for made in (docs.pairs_table, docs.machine_table, docs.curves_table):
    print(made(rows), "\n")
  if DOCS.value:
    command = shlex.join(["python", "perf/main.py", *sys.argv[1:]])
    docs.write(ROOT / "docs" / "benchmarks.md", rows, command)


def benches():
  """One for each size and number of frames."""
  from perf import model

  numbers = {name: int(n) for name, n in (item.split("=") for item in SET.value)}
  for name in SIZE.value:
    if name not in model.SIZES:
      raise app.UsageError(f"size must be of {sorted(model.SIZES)}, not {name!r}")
    size = model.SIZES[name]._replace(**numbers)
    for frames in map(int, FRAMES.value or [size.frames]):
      yield model.Bench(
        name=name,
        size=size._replace(frames=frames),
        base=BASE.value,
        rank=RANK.value,
        attention=ATTENTION.value,
        scratch=pathlib.Path(SCRATCH.value),
      )


def setup_peers(folder: pathlib.Path) -> None:
  """An environment for each peer, whose pins then do not touch ours."""
  from perf import peer

  for name, required in peer.REQUIRES.items():
    venv.create(folder / name, with_pip=True)
    python = folder / name / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *required], check=True)
    print(f"--{name}={python}")


if __name__ == "__main__":
  app.run(main)
