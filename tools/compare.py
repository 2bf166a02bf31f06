"""Compares workdirs and prints Markdown tables.

tools/compare.py claims A:B [A:B ...] [--stage=claims_1]
  Prints how often scores of claims order two answers as the truth does. A and B are
  workdirs that score the same answers in two ways. Several pairs are pooled.

tools/compare.py labels A:B [A:B ...]
  Prints how often preferences agree with the truth. A and B are workdirs that label the
  same prompts in two ways. Several pairs are pooled.

tools/compare.py benchmarks A B
  Prints two results of a benchmark, WORKDIR/eval/NAME/POLICY, and their difference over
  the cases that both have. Prints a warning for each setting that differs.

tools/compare.py seeds WORKDIR [WORKDIR ...] [--each]
  Prints the mean of each policy over workdirs that differ in their seed, and each
  seed's value. --each prints a table for each workdir: before, after, difference.

tools/compare.py plans A B
  Prints every figure on which two folders of plans differ. A and B are --out of
  tools/scaling.py, for example of two versions of the code.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from tools import comparisons  # noqa: E402

STAGE = flags.DEFINE_string("stage", "claims_1", "For claims: the stage to compare.")
EACH = flags.DEFINE_bool("each", False, "For seeds: a table for each workdir.")
COMMAND_FLAGS = {
  "claims": {"stage"},
  "labels": set(),
  "benchmarks": set(),
  "seeds": {"each"},
  "plans": set(),
}
FOLDERS = ("benchmarks", "plans")  # Their arguments are two folders.


def main(argv: list[str]) -> None:
  """Prints the tables of the subcommand in the first argument."""
  command, *names = argv[1:] or [""]
  if command not in COMMAND_FLAGS:
    raise app.UsageError(
      f"the first argument must be one of {', '.join(COMMAND_FLAGS)}, got {command!r}"
    )
  for flag in {"stage", "each"} - COMMAND_FLAGS[command]:
    if flags.FLAGS[flag].present:
      raise app.UsageError(f"--{flag} does not apply to {command!r}")
  try:
    print(compare(command, names))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"error: {error}")


def compare(command: str, names: list[str]) -> str:
  """Returns the tables of a subcommand.

  Raises:
    FileNotFoundError: A workdir has no results of the stage.
    ValueError: The results cannot be compared.
    app.UsageError: The subcommand takes other arguments.
  """
  if command in FOLDERS:
    if len(names) != 2:
      raise app.UsageError(f"{command} requires two folders, got {len(names)}")
    first, second = map(pathlib.Path, names)
    if command == "plans":
      return comparisons.compare_plans(first, second)
    return comparisons.compare_benchmarks(first, second)
  if not names:
    raise app.UsageError(f"{command} requires one or more workdirs")
  if command == "seeds":
    folders = [pathlib.Path(name) for name in names]
    return (
      comparisons.make_seed_tables(folders)
      if EACH.value
      else comparisons.summarize_seeds(folders)
    )
  if wrong := [name for name in names if name.count(":") != 1]:
    raise app.UsageError(f"{command} requires pairs of workdirs, A:B, got {wrong}")
  pairs = [tuple(map(pathlib.Path, name.split(":"))) for name in names]
  if command == "claims":
    return comparisons.compare_claims(pairs, STAGE.value)
  return comparisons.compare_labels(pairs)


if __name__ == "__main__":
  app.run(main)
