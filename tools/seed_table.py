"""Results of workdirs as Markdown tables.

tools/seed_table.py runs/seed*         a table of each: before, after, difference
tools/seed_table.py --seeds runs/seed*  one table of all, which are seeds of one recipe:
                                    a row for each policy, the mean of the seeds and,
                                    in brackets, each
"""

import json
import pathlib
import statistics
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
SHORT = {
  "correct answers": (("accuracy",), 100),
  "false premise": (("by_kind", "false_premise"), 100),
  "unsupported statements": (("hallucination",), 100),
  "true statements made": (("recall",), 100),
  "the judge's score": (("judge_score",), 100),
  "words": (("words",), 1),
}


def main(given: list[str]) -> None:
  folders = [pathlib.Path(name) for name in given if name != "--seeds"]
  if not folders or "--help" in given:
    sys.exit(__doc__)
  found = {folder: results_of(folder) for folder in folders}
  if "--seeds" in given:
    show_seeds(list(found.values()))
    return
  for folder, results in found.items():
    show(folder, results)


def results_of(folder: pathlib.Path) -> dict:
  path = folder / "eval" / "results.json"
  if not path.exists():
    sys.exit(f"error: no {path}: the evaluation of {folder} has not finished")
  return json.loads(path.read_text())


def show_seeds(found: list[dict]) -> None:
  """A row for each policy that all of the workdirs have."""
  print("| | " + " | ".join(SHORT) + " |\n|---|" + "---|" * len(SHORT))
  for policy in found[0]["policies"]:
    if not all(policy in results["policies"] for results in found):
      continue
    cells = []
    for place, scale in SHORT.values():
      stats = [at(results["policies"][policy], place) for results in found]
      cells.append(seeds_said([scale * s["mean"] for s in stats if s]))
    print(f"| {policy} | " + " | ".join(cells) + " |")


def seeds_said(values: list[float]) -> str:
  if not values:
    return ""
  each = ", ".join(f"{value:.1f}" for value in values)
  return f"{statistics.mean(values):.1f} ({each})" if len(values) > 1 else each


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
  if not (folder / "rm" / "done.json").exists():
    return "no reward model"
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
