"""Compares workdirs in Markdown tables, for tools/compare.py."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vlmrlaif_jax.core.files import find_differences, read_json
from vlmrlaif_jax.core.jsonl import JsonRow, read_jsonl
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.summary import (
  FRACTION,
  HELD_OUT,
  PERCENT,
  PLAIN,
  POINTS,
  TableLine,
  format_interval,
  format_row,
  format_seeds,
  make_measure_rows,
)

Pairs: TypeAlias = Sequence[tuple[Path, Path]]

KINDS = {"descriptions": True, "short answers": False}
TRUTHS = ("unsupported", "mistakes")
CHANGE = "A - B"
SEED_COLUMNS = (
  TableLine("mean over kinds", "mean_of_kinds", POINTS),
  TableLine("correct answers", "accuracy", POINTS),
  TableLine("false premise", "false_premise.accuracy", POINTS),
  TableLine("unsupported statements", "hallucination", POINTS),
  TableLine("true statements made", "recall", POINTS),
  TableLine("the judge's score", "judge_score", POINTS),
  TableLine("words", "words", PLAIN),
)
QUESTIONS = ("attribute", "count", "motion", "event", "order", "presence")
WORKDIR_ROWS = (
  TableLine("mean over kinds", "mean_of_kinds", POINTS),
  TableLine("correct answers", "accuracy", POINTS),
  *(TableLine(f"- {kind}", f"{kind}.accuracy", POINTS) for kind in QUESTIONS),
  TableLine("- false premise", "false_premise.accuracy", POINTS),
  TableLine("- description, F1", "description.f1", POINTS),
  TableLine("unsupported statements", "hallucination", POINTS),
  TableLine("true statements made", "recall", POINTS),
)


class Agreement(NamedTuple):
  """A prompt, and how often each of two workdirs agrees with the truth about it."""

  video: str  # Unit of resampling: prompts about one video stay together.
  sides: tuple[tuple[int, int], tuple[int, int]]  # (agreeing, comparable) of A, then B.


def name_video(pair: tuple[Path, Path], row: JsonRow) -> str:
  """Returns a name for a prompt's video, from the prompt's id in the embedded world."""
  return f"{pair}/{row['id'].rsplit('-', 1)[0]}"


def format_shares(prompts: Sequence[Agreement]) -> dict[str, str]:
  """Formats the shares of both sides and their difference, with intervals."""
  sides = [
    np.array([prompt.sides[i] for prompt in prompts], float).reshape(-1, 2).T
    for i in range(2)
  ]
  if not all(comparable.any() for _, comparable in sides):
    return dict.fromkeys(("A", "B", CHANGE), "too few pairs")
  resampling = bootstrap.Resampling([prompt.video for prompt in prompts])
  shares = [
    bootstrap.compute_ratio_interval(*side, resampling)._replace(n=int(side[1].sum()))
    for side in sides
  ]
  change = bootstrap.compute_ratio_difference(*sides[0], *sides[1], resampling)
  counted = PERCENT._replace(counted=True)
  return {
    **format_row(dict(zip("AB", (s._asdict() for s in shares), strict=True)), counted),
    CHANGE: format_interval(change._asdict(), POINTS, sign="+"),
  }


# Scores of claims.


def compare_claims(pairs: Pairs, stage: str) -> str:
  """Returns a table of how often scores of claims order answers as the truth does.

  Args:
    pairs: Workdirs that score the same answers in two ways.
    stage: The stage that scored them, such as "claims_1".

  Raises:
    FileNotFoundError: A workdir has no results of the stage.
    ValueError: Two workdirs have different answers.
  """
  answers = [
    tuple(read_scored_answers(workdir, stage) for workdir in pair) for pair in pairs
  ]
  for pair, both in zip(pairs, answers, strict=True):
    check_same(pair, both, "answers")
  rows = []
  for (kind, is_long), truth in itertools.product(KINDS.items(), TRUTHS):
    prompts = [
      Agreement(
        name_video(pair, first),
        (count_ordered_pairs(first, truth), count_ordered_pairs(second, truth)),
      )
      for pair, both in zip(pairs, answers, strict=True)
      for first, second in zip(*both, strict=True)
      if first["long"] == is_long
    ]
    rows.append([kind, truth, *format_shares(prompts).values()])
  return markdown_table(rows, ["of", "better is who has fewer", "A", "B", CHANGE])


def check_same(
  pair: tuple[Path, Path], both: Sequence[list[JsonRow]], key: str
) -> None:
  """Raises a ValueError if rows of two workdirs differ in a field."""
  first, second = ([row[key] for row in rows] for rows in both)
  if first != second:
    raise ValueError(f"{pair[0]} and {pair[1]} must have the same {key} of prompts")


def read_scored_answers(workdir: Path, stage: str) -> list[JsonRow]:
  """Returns each prompt's answers; "long" is True for descriptions."""
  path = workdir / stage / "answers.jsonl"
  if not path.exists():
    raise FileNotFoundError(
      f"no {path}: run configs/rlaif_v.py with --workdir={workdir}"
    )
  prompts = read_jsonl(workdir / "world" / "prompts.jsonl")
  kinds = {row["id"]: row["truth"]["kind"] for row in prompts}
  rows = read_jsonl(path)[1:]  # The first line is the fingerprint.
  return [{**row, "long": kinds[row["id"]] == "description"} for row in rows]


def count_ordered_pairs(row: JsonRow, truth: str) -> tuple[int, int]:
  """Counts the pairs of a prompt's answers that scores and truth both order.

  Returns:
    (pairs that both order in the same way, pairs that both order).
  """
  agreeing = comparable = 0
  for a, b in itertools.combinations(zip(row["scores"], row[truth], strict=True), 2):
    if None in (*a, *b) or a[0] == b[0] or a[1] == b[1]:
      continue
    comparable += 1
    agreeing += (a[0] > b[0]) == (a[1] < b[1])
  return agreeing, comparable


# Preferences.


def compare_labels(pairs: Pairs) -> str:
  """Returns a table of how often preferences agree with the truth.

  Args:
    pairs: Workdirs that label the same prompts in two ways.

  Raises:
    FileNotFoundError: A workdir has no labels.
    ValueError: Two workdirs have different prompts.
  """
  prompts = []
  for pair in pairs:
    both = [read_labels(workdir) for workdir in pair]
    check_same(pair, both, "id")
    prompts += [
      Agreement(
        name_video(pair, first), (count_agreement(first), count_agreement(second))
      )
      for first, second in zip(*both, strict=True)
    ]
  row = format_shares(prompts)
  return markdown_table([["kept pairs", *row.values()]], ["of", *row])


def read_labels(workdir: Path) -> list[JsonRow]:
  """Returns the label of each prompt."""
  paths = sorted((workdir / "label" / "blocks").glob("*.jsonl"))
  if not paths:
    raise FileNotFoundError(
      f"no labels in {workdir}: run configs/label.py with --workdir={workdir}"
    )
  return [row for path in paths for row in read_jsonl(path)]


def count_agreement(row: JsonRow) -> tuple[int, int]:
  """Returns (1 if preference and truth agree, 1 if both prefer an answer), else 0."""
  first, second = row["mistakes"]
  known = None not in (row["preference"], first, second) and first != second
  return int(known and (first < second) == (row["preference"] == 1)), int(known)


# Benchmarks.


def compare_benchmarks(first: Path, second: Path) -> str:
  """Returns a table of two results of a benchmark, and warnings about settings.

  Args:
    first: A folder WORKDIR/eval/NAME/POLICY.
    second: Another such folder.

  Raises:
    FileNotFoundError: A folder has no results.
  """
  folders = (first, second)
  results = [read_json(folder / "scores.json") for folder in folders]
  cases = [read_jsonl(folder / "rows.jsonl") for folder in folders]
  names = merge_keys(result["scores"] for result in results)
  changes = {
    name: bootstrap.compute_paired_difference(*cases, name, bootstrap.Resampling())
    for name in names
  }
  columns = dict(zip(map(str, folders), results, strict=True))
  scores = {name: result["scores"] for name, result in columns.items()}
  scores["B - A"] = {name: x._asdict() for name, x in changes.items() if x}
  form = FRACTION._replace(counted=True)
  rows = make_measure_rows(
    [TableLine(name, name, form) for name in names], scores, signed="B - A"
  )
  lines = [row.values() for row in rows]
  for name in merge_keys(result["counts"] for result in results):
    lines.append([name, *(result["counts"].get(name, 0) for result in results), ""])
  warnings = [
    f"warning: {key} differs: {a!r} in A, {b!r} in B"
    for key, (a, b) in find_differences(
      *(result["recipe"] for result in results)
    ).items()
  ]
  return "\n".join([markdown_table(lines, ["measure", *scores]), *warnings])


def compare_plans(first: Path, second: Path) -> str:
  """Returns a table of every figure on which two folders of plans differ.

  Args:
    first: Folder of JSON files, one for each plan; subfolders are read, too.
    second: Another such folder.

  Raises:
    FileNotFoundError: A folder has no plans.
    ValueError: One folder has plans that the other lacks.
  """
  sides = [list_plans(folder) for folder in (first, second)]
  if alone := sorted(sides[0].keys() ^ sides[1].keys()):
    raise ValueError(f"only one of {first} and {second} has {', '.join(alone)}")
  rows = [
    [name, figure, *map(str, values)]
    for name in sides[0]
    for figure, values in find_differences(
      *(read_figures(side[name]) for side in sides)
    ).items()
  ]
  count = f"{len(sides[0])} plans, {len(rows)} figures differ."
  table = markdown_table(rows, ["plan", "figure", str(first), str(second)])
  return f"{count}\n\n{table}" if rows else count


def list_plans(folder: Path) -> dict[str, Path]:
  """Returns the plans of a folder by their names within it."""
  paths = sorted(folder.rglob("*.json"))
  if not paths:
    raise FileNotFoundError(
      f"{folder} has no plans: run tools/scaling.py --out={folder}"
    )
  return {str(path.relative_to(folder).with_suffix("")): path for path in paths}


def read_figures(path: Path) -> JsonRow:
  """Returns the figures of a plan as nested dicts, with the index as key in lists."""

  def nest(value: Any) -> Any:
    if isinstance(value, list):
      value = {str(index): each for index, each in enumerate(value)}
    if isinstance(value, dict):
      return {name: nest(each) for name, each in value.items()}
    return value

  return nest(read_json(path))


def merge_keys(mappings: Iterable[dict[str, Any]]) -> list[str]:
  """Returns the keys of all mappings, without duplicates."""
  return list(dict.fromkeys(key for each in mappings for key in each))


# Evaluations.


def read_evaluation(workdir: Path) -> JsonRow:
  """Returns the results of the evaluation on held-out questions.

  Raises:
    FileNotFoundError: The evaluation has not finished.
  """
  path = workdir / "eval" / "results.json"
  if not path.exists():
    raise FileNotFoundError(f"no {path}: the evaluation of {workdir} has not finished")
  return read_json(path)[HELD_OUT]


def summarize_seeds(workdirs: Sequence[Path]) -> str:
  """Returns a table of the mean of each policy over seeds, and each seed's value."""
  results = [read_evaluation(workdir)["policies"] for workdir in workdirs]
  rows = []
  for policy in results[0]:
    if all(policy in policies for policies in results):
      rows.append(
        [policy, *(format_seeds_cell(results, policy, line) for line in SEED_COLUMNS)]
      )
  return markdown_table(rows, ["", *(line.label for line in SEED_COLUMNS)])


def format_seeds_cell(results: Sequence[JsonRow], policy: str, line: TableLine) -> str:
  """Formats a measure of a policy over seeds."""
  stats = [policies[policy].get(line.measure) for policies in results]
  return format_seeds([line.format.scale * stat["mean"] for stat in stats if stat])


def make_seed_tables(workdirs: Sequence[Path]) -> str:
  """Returns a table for each workdir: before, after and difference, in per cent."""
  return "\n\n".join(map(make_workdir_table, workdirs))


def make_workdir_table(workdir: Path) -> str:
  """Returns the table of a workdir, after a line about its data and labels."""
  results = read_evaluation(workdir)
  before, after = results["pair"]
  policies, change = results["policies"], results["difference"]
  columns = {before: policies[before], after: policies[after], "difference": change}
  is_measured = lambda line: any(line.measure in stats for stats in columns.values())
  lines = [line for line in WORKDIR_ROWS if is_measured(line)]
  rows = [row.values() for row in make_measure_rows(lines, columns)]
  head = ["%", before.upper(), after.upper(), "difference"]
  about = (
    f"**{workdir.name}** ({results['questions']} questions, "
    f"{results['videos']} videos; {describe_labels(workdir)})"
  )
  return f"{about}\n\n{markdown_table(rows, head)}"


def describe_labels(workdir: Path) -> str:
  """Returns a phrase with the accuracy of the labels and of the reward model."""
  if not (workdir / "rm" / "done.json").exists():
    return "no reward model"
  rates = read_json(workdir / "label" / "rates.json")
  rm = read_json(workdir / "rm" / "done.json")["summary"]
  return (
    f"{rates['kept']} of {rates['asked']} judged pairs kept, "
    f"{rates['truth_agreement']:.1%} of them agree with truth; reward model: "
    f"{rm['held_out_accuracy']:.1%} of {rm['held_out']} held-out pairs"
  )
