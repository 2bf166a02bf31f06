"""Times GRPO's update with and without a shared prompt, on random weights.

python perf/run_shared_prefix.py --size=tiny --groups=2,4,8,16 --lengths=64,256,1024
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

SIZE = flags.DEFINE_string("size", "tiny", "Of bench_model.SIZES.")
RANK = flags.DEFINE_integer("rank", 16, "Of the LoRA update.")
GROUPS = flags.DEFINE_list("groups", "2,4,8,16", "Responses to each prompt.")
LENGTHS = flags.DEFINE_list("lengths", "64,256,1024", "Of prompts, in tokens.")
PROMPTS = flags.DEFINE_integer("prompts", 2, "At once.")
RESPONSE = flags.DEFINE_integer("response", 64, "Length of responses, in tokens.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Pairs that are timed in turns.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  from perf import model
  from perf import shared_prefix as bench

  if SIZE.value not in model.SIZES:
    raise app.UsageError(f"size must be of {sorted(model.SIZES)}, not {SIZE.value!r}")
  size, nowhere = model.SIZES[SIZE.value], pathlib.Path()
  asked = model.Bench(SIZE.value, size, "none", RANK.value, "", nowhere)
  cases = [
    bench.Case(PROMPTS.value, int(group), int(length), RESPONSE.value)
    for length in LENGTHS.value
    for group in GROUPS.value
  ]
  rows = []
  for row in bench.measure(asked, cases, REPEATS.value):
    print(row, file=sys.stderr, flush=True)
    rows.append(row)
  print(bench.table(rows))


if __name__ == "__main__":
  app.run(main)
