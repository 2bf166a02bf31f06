"""Compares workdirs and prints Markdown tables.

tools/compare.py claims A:B [A:B ...] [--stage=claims_1]
  How often scores of claims order two answers as truth does. A and B are workdirs that
  score the same answers in two ways. Several pairs of workdirs are pooled.

tools/compare.py labels A:B [A:B ...]
  How often preferences agree with truth. A and B are workdirs that label the same
  prompts in two ways. Several pairs of workdirs are pooled.

tools/compare.py benchmarks A B
  Two results of a benchmark, WORKDIR/eval/NAME/POLICY, and their difference over
  the cases that both have. Warns of settings that differ.

tools/compare.py seeds WORKDIR [WORKDIR ...] [--each]
  Evaluations of workdirs that differ in their seed: the mean of each policy over the
  seeds and each seed's value. --each prints a table for each workdir instead: before,
  after, difference.

tools/compare.py plans A B
  Every figure on which two folders of plans differ. A and B are --out of
  tools/scaling.py, such as of two versions of the code.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from tools import comparisons  # noqa: E402

STAGE = flags.DEFINE_string("stage", "claims_1", "Of claims: the stage to compare.")
EACH = flags.DEFINE_bool("each", False, "Of seeds: a table for each workdir.")
FLAGS_OF = {
  "claims": {"stage"},
  "labels": set(),
  "benchmarks": set(),
  "seeds": {"each"},
  "plans": set(),
}
FOLDERS = ("benchmarks", "plans")  # Their arguments are two folders.


def main(argv: list[str]) -> None:
  command, *names = argv[1:] or [""]
  if command not in FLAGS_OF:
    raise app.UsageError(
      f"the first argument must be one of {', '.join(FLAGS_OF)}, got {command!r}"
    )
  for flag in {"stage", "each"} - FLAGS_OF[command]:
    if flags.FLAGS[flag].present:
      raise app.UsageError(f"--{flag} does not apply to {command!r}")
  try:
    print(compare(command, names))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"error: {error}")


def compare(command: str, names: list[str]) -> str:
  """Returns the tables of a subcommand.

  Raises:
    FileNotFoundError: A stage has not been run.
    ValueError: The results cannot be compared.
    app.UsageError: The subcommand takes other arguments.
  """
  if command in FOLDERS:
    if len(names) != 2:
      raise app.UsageError(f"{command} requires two folders, got {len(names)}")
    first, second = map(pathlib.Path, names)
    if command == "plans":
      return comparisons.plans(first, second)
    return comparisons.benchmarks(first, second)
  if not names:
    raise app.UsageError(f"{command} requires one or more workdirs")
  if command == "seeds":
    folders = [pathlib.Path(name) for name in names]
    return comparisons.each_seed(folders) if EACH.value else comparisons.seeds(folders)
  if wrong := [name for name in names if name.count(":") != 1]:
    raise app.UsageError(f"{command} requires pairs of workdirs, A:B, got {wrong}")
  pairs = [tuple(map(pathlib.Path, name.split(":"))) for name in names]
  if command == "claims":
    return comparisons.claims(pairs, STAGE.value)
  return comparisons.labels(pairs)


if __name__ == "__main__":
  app.run(main)
