"""Compares scores of claims with truth.

tools/compare_claims.py A:B [A:B ...] [--stage=claims_1]

Of the answers to a prompt every two are compared whose scores differ, and of which
truth tells the better: by unsupported statements, and by all mistakes, what is left out
among them. A and B are workdirs that label the same answers in two ways, such as
--config.claims.splitter=rules and whole. Pairs of workdirs are taken together.
"""

import itertools
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from vlmrlaif_jax.core.jsonl import read_jsonl  # noqa: E402
from vlmrlaif_jax.evals import bootstrap  # noqa: E402

KINDS = {"descriptions": True, "short answers": False}
TRUTHS = ("unsupported", "mistakes")


def main(given: list[str]) -> None:
  pairs = [one for one in given if not one.startswith("--")]
  named = [one.removeprefix("--stage=") for one in given if one.startswith("--stage=")]
  wrong = len(pairs) + len(named) != len(given)
  if not pairs or wrong or not all(pair.count(":") == 1 for pair in pairs):
    sys.exit(__doc__)
  stage = (named or ["claims_1"])[-1]
  both = [[rows(pathlib.Path(w), stage) for w in pair.split(":")] for pair in pairs]
  for pair, (first, second) in zip(pairs, both, strict=True):
    if [row["answers"] for row in first] != [row["answers"] for row in second]:
      sys.exit(f"error: the workdirs of {pair} hold other answers")
  print("| of | better is who has fewer | A | B | A - B |\n|---|---|---|---|---|")
  for (kind, long), truth in itertools.product(KINDS.items(), TRUTHS):
    sides, videos = [[], []], []
    for pair, found in zip(pairs, both, strict=True):
      chosen = [i for i, row in enumerate(found[0]) if row["long"] == long]
      for side, of in zip(sides, found, strict=True):
        side += [counts(of[i], truth) for i in chosen]
      # The embedded world names a prompt for its video and its place there.
      videos += [f"{pair}/{found[0][i]['id'].rsplit('-', 1)[0]}" for i in chosen]
    print(f"| {kind} | {truth} | {' | '.join(said(sides, videos))} |")


def rows(workdir: pathlib.Path, stage: str) -> list[dict]:
  """What became of each prompt's answers; "long": whether they are descriptions."""
  path = workdir / stage / "answers.jsonl"
  if not path.exists():
    sys.exit(f"error: no {path}: run configs/rlaif_v.py there")
  asked = read_jsonl(workdir / "world" / "prompts.jsonl")
  kinds = {row["id"]: row["truth"]["kind"] for row in asked}
  found = read_jsonl(path)[1:]  # The first line says what they are of.
  return [{**row, "long": kinds[row["id"]] == "description"} for row in found]


def counts(row: dict, truth: str) -> tuple[int, int]:
  """(pairs of answers that the scores order as truth does, pairs that both order)."""
  right = known = 0
  for a, b in itertools.combinations(zip(row["scores"], row[truth], strict=True), 2):
    if None in (*a, *b) or a[0] == b[0] or a[1] == b[1]:
      continue
    known += 1
    right += (a[0] > b[0]) == (a[1] < b[1])
  return right, known


def said(sides: list[list[tuple[int, int]]], videos: list[str]) -> list[str]:
  """Shares of both sides and their difference, with intervals over videos."""
  how = dict(seed=0, groups=videos)
  both = [np.array(side, float).T for side in sides]
  if not all(side[1].any() for side in both):
    return ["too few pairs"] * 3
  shares = [bootstrap.ratio_interval(*side, **how) for side in both]
  change = bootstrap.ratio_difference(*both[0], *both[1], **how)
  write = lambda x: f"{100 * x.mean:.1f} % [{100 * x.low:.1f}, {100 * x.high:.1f}]"
  told = [
    f"{write(share)} of {int(side[1].sum()):,}"
    for share, side in zip(shares, both, strict=True)
  ]
  return [*told, write(change).replace(" %", "")]


if __name__ == "__main__":
  main(sys.argv[1:])
