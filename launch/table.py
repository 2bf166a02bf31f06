"""Results of several workdirs as one Markdown table: launch/table.py runs/seed*."""

import json
import pathlib
import sys

ROWS = {  # What is shown, and where it stands in eval/results.json.
  "correct answers": ("accuracy",),
  "- attribute": ("by_kind", "attribute"),
  "- count": ("by_kind", "count"),
  "- motion": ("by_kind", "motion"),
  "- event": ("by_kind", "event"),
  "- order": ("by_kind", "order"),
  "- presence": ("by_kind", "presence"),
  "- false premise": ("by_kind", "false_premise"),
  "unsupported statements": ("hallucination",),
  "true statements made": ("recall",),
}


def main(folders: list[str]) -> None:
  if not folders or "--help" in folders:
    sys.exit(__doc__)
  for folder in map(pathlib.Path, folders):
    path = folder / "eval" / "results.json"
    if not path.exists():
      sys.exit(f"error: no {path}: the evaluation of {folder} has not finished")
    show(folder, json.loads(path.read_text()))


def show(folder: pathlib.Path, results: dict) -> None:
  """A table of one workdir: SFT, what RL made of it, the difference; in per cent."""
  print(
    f"\n**{folder.name}** ({results['questions']} questions, "
    f"{results['videos']} videos; {label_line(folder)})\n"
  )
  before, after = results["pair"]
  print(f"| % | {before.upper()} | {after.upper()} | difference |\n|---|---|---|---|")
  policies = results["policies"]
  for name, place in ROWS.items():
    cells = [
      said(at(where, place))
      for where in (policies[before], policies[after], results["difference"])
    ]
    if any(cells):
      print(f"| {name} | " + " | ".join(cells) + " |")


def label_line(folder: pathlib.Path) -> str:
  """How good the labels and the reward model were."""
  rates = json.loads((folder / "label" / "rates.json").read_text())
  rm = json.loads((folder / "rm" / "done.json").read_text())["summary"]
  return (
    f"{rates['kept']} of {rates['asked']} judged pairs kept, "
    f"{rates['truth_agreement']:.1%} of them as truth has it; reward model: "
    f"{rm['held_out_accuracy']:.1%} of {rm['held_out']} held-out pairs"
  )


def at(stats: dict, place: tuple[str, ...]) -> dict:
  for key in place:
    stats = stats.get(key, {})
  return stats


def said(stat: dict) -> str:
  if not stat:
    return ""
  mean, low, high = (100 * stat[key] for key in ("mean", "low", "high"))
  return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
  main(sys.argv[1:])
