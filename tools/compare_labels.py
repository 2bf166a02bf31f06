"""Labels of some workdirs against others': tools/compare_labels.py A:B [A:B ...].

How often the preferences in A and in B are as truth has them, pairs of workdirs taken
together. Both of a pair are of the same prompts, such as with and without narrative.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from vlmrlaif_jax.core.jsonl import read_jsonl  # noqa: E402
from vlmrlaif_jax.evals import bootstrap  # noqa: E402


def main(pairs: list[str]) -> None:
  if not pairs or "--help" in pairs or not all(pair.count(":") == 1 for pair in pairs):
    sys.exit(__doc__)
  sides = [[], []]
  videos = []
  for pair in pairs:
    both = [rows(pathlib.Path(folder)) for folder in pair.split(":")]
    if [row["id"] for row in both[0]] != [row["id"] for row in both[1]]:
      sys.exit(f"error: the workdirs of {pair} have other prompts")
    for side, found in zip(sides, both, strict=True):
      side += map(verdict, found)
    # The embedded world names a prompt for its video and its place there.
    videos += [f"{pair}/{row['id'].rsplit('-', 1)[0]}" for row in both[0]]
  show(*(np.array(side, float) for side in sides), videos)


def rows(workdir: pathlib.Path) -> list[dict]:
  """What became of each prompt of a workdir."""
  paths = sorted((workdir / "label" / "blocks").glob("*.jsonl"))
  if not paths:
    sys.exit(f"error: no labels in {workdir}: run configs/label.py there")
  return [row for path in paths for row in read_jsonl(path)]


def verdict(row: dict) -> tuple[bool, bool]:
  """(whether the preference is as truth has it, whether truth prefers one at all)."""
  first, second = row["mistakes"]
  known = None not in (row["preference"], first, second) and first != second
  return known and (first < second) == (row["preference"] == 1), known


def show(first: np.ndarray, second: np.ndarray, videos: list[str]) -> None:
  said = lambda x: f"{100 * x.mean:.1f} % [{100 * x.low:.1f}, {100 * x.high:.1f}]"
  how = dict(seed=0, groups=videos)
  for name, side in (("A", first), ("B", second)):
    share = bootstrap.ratio_interval(*side.T, **how)
    print(f"{name}: {said(share)} of {int(side[:, 1].sum())} kept pairs")
  change = bootstrap.ratio_difference(*first.T, *second.T, **how)
  print(f"A - B: {said(change)}")


if __name__ == "__main__":
  main(sys.argv[1:])
