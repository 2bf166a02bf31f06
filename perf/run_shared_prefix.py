"""Times GRPO's update with and without a shared prompt, on random weights.

python perf/run_shared_prefix.py --size=tiny --groups=2,4,8,16 --lengths=64,256,1024
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

SIZE = flags.DEFINE_string("size", "tiny", "Model: tiny, 110m or 7b.")
RANK = flags.DEFINE_integer("rank", 16, "LoRA rank.")
GROUPS = flags.DEFINE_list("groups", "2,4,8,16", "Responses to each prompt.")
LENGTHS = flags.DEFINE_list("lengths", "64,256,1024", "Tokens of a prompt.")
PROMPTS = flags.DEFINE_integer("prompts", 2, "Prompts of an update.")
RESPONSE = flags.DEFINE_integer("response", 64, "Tokens of a response.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each form, in turns.")


def main(argv: list[str]) -> None:
  """Times all cases and prints a table."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  from perf import model
  from perf import shared_prefix as bench

  if SIZE.value not in model.SIZES:
    sizes = sorted(model.SIZES)
    raise app.UsageError(f"--size must be in {sizes}, got {SIZE.value!r}")
  size, no_scratch = model.SIZES[SIZE.value], pathlib.Path()
  settings = model.Bench(SIZE.value, size, "none", RANK.value, "", no_scratch)
  cases = [
    bench.Case(PROMPTS.value, int(group), int(length), RESPONSE.value)
    for length in LENGTHS.value
    for group in GROUPS.value
  ]
  rows = []
  for row in bench.measure(settings, cases, REPEATS.value):
    print(row, file=sys.stderr, flush=True)
    rows.append(row)
  print(bench.format_table(rows))


if __name__ == "__main__":
  app.run(main)
