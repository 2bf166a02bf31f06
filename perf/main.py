"""Measures speed with random weights: python perf/main.py --size=tiny.

--trl and --tunix also measure other libraries, each with the Python of an environment
that --setup_peers=DIR creates. It prints tables and appends each row to --out as JSON.
A second run skips rows that --out has. See docs/benchmarks.md.
"""

import pathlib
import shlex
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

SIZE = flags.DEFINE_list("size", "tiny", "Models: tiny, 110m, 7b.")
BASE = flags.DEFINE_string("base", "none", "Quantization: none, nf4 or int8.")
WHAT = flags.DEFINE_list(
  "what", "machine,sft,dpo,grpo,ppo,sample", "Also available: load, curves (tiny only)."
)
PEERS = {
  "trl": flags.DEFINE_string("trl", "", "Python of an environment with TRL."),
  "tunix": flags.DEFINE_string("tunix", "", "Python of an environment with Tunix."),
}
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed runs; the median is reported.")
RANK = flags.DEFINE_integer("rank", 64, "LoRA rank.")
ATTENTION = flags.DEFINE_string("attention", "", "xla, cudnn (GPU) or splash (TPU).")
FRAMES = flags.DEFINE_list("frames", [], "Frames per video; each number adds rows.")
SET = flags.DEFINE_list("set", [], "Other fields of Size: new=64,group=16.")
SCRATCH = flags.DEFINE_string("scratch", "runs/bench", "Folder of checkpoints, logs.")
OUT = flags.DEFINE_string("out", "runs/bench.jsonl", "Output; its rows are skipped.")
DOCS = flags.DEFINE_bool("write_docs", False, "Write tables to docs/benchmarks.md.")
SETUP = flags.DEFINE_string("setup_peers", "", "Folder for the peers' environments.")


def main(argv: list[str]) -> None:
  """Measures, prints tables, and writes the rows."""
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
  for each in list_benches():
    # Only the tiny model is fast enough for a curve's dozens of steps.
    what = [w for w in WHAT.value if w != "curves" or each.name == "tiny"]
    for row in bench.measure(each, what, peers, pairs=PAIRS.value, done=rows):
      append_jsonl(out, [row])
      rows.append(row)
  for format_rows in (docs.format_pairs, docs.format_machine, docs.format_curves):
    print(format_rows(rows), "\n")
  if DOCS.value:
    command = shlex.join(["python", "perf/main.py", *sys.argv[1:]])
    docs.write_page(ROOT / "docs" / "benchmarks.md", rows, command)


def list_benches():
  """Yields the settings for each size and number of frames."""
  from perf import model

  numbers = {name: int(n) for name, n in (item.split("=") for item in SET.value)}
  for name in SIZE.value:
    if name not in model.SIZES:
      raise app.UsageError(f"--size must be in {sorted(model.SIZES)}, got {name!r}")
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
  """Creates an environment for each peer, so that its versions do not affect ours."""
  from perf import peer

  for name, required in peer.REQUIRES.items():
    venv.create(folder / name, with_pip=True)
    python = folder / name / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *required], check=True)
    print(f"--{name}={python}")


if __name__ == "__main__":
  app.run(main)
