"""What is measured of answers: each measure with its interval, for each policy."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.bootstrap import Interval, Resampling
from vlmrlaif_jax.evals.world_truth import Verdict

Row: TypeAlias = dict[str, Any]


class Marked(NamedTuple):
  """An answer of a policy, and what is known of it."""

  text: str
  stopped: bool  # Whether it came to its end.
  verdict: Verdict
  reward: float | None = None  # The reward model's score, if there is one.


# A measure is a ratio of sums over answers: what each answer adds above and below, or
# None if the measure does not speak of it.
Measure: TypeAlias = Callable[[Marked], tuple[float | int, float | int] | None]
MEASURES: dict[str, Measure] = {
  "accuracy": lambda m: None if m.verdict.correct is None else (m.verdict.correct, 1),
  "hallucination": lambda m: (
    None if m.verdict.recall is None else (len(m.verdict.unsupported), m.verdict.claims)
  ),
  "recall": lambda m: None if m.verdict.recall is None else (m.verdict.recall, 1),
  "words": lambda m: (len(m.text.split()), 1),
  "stopped": lambda m: (m.stopped, 1),
  "reward": lambda m: None if m.reward is None else (m.reward, 1),
}


def measure_all(
  marked: dict[str, list[Marked]], pair: tuple[str, str], how: Resampling
) -> Row:
  """{"policies": {name: {measure: ...}}, "difference": {measure: ...}}, where the
  difference is of the pair's second policy from its first, question by question.
  """
  policies: Row = {name: {"by_kind": {}} for name in marked}
  change: Row = {"by_kind": {}}

  def add(name: str, measure: Measure, place: Callable[[Row], Row]) -> None:
    stats, apart = compare(measure, marked, pair, how)
    for policy, stat in stats.items():
      place(policies[policy])[name] = stat._asdict()
    if apart is not None:
      place(change)[name] = apart._asdict()

  for name, measure in MEASURES.items():
    add(name, measure, lambda row: row)
  asked = [m.verdict for m in next(iter(marked.values()))]
  for kind in sorted({v.kind for v in asked if v.correct is not None}):
    add(kind, accuracy_of(kind), lambda row: row["by_kind"])
  return {"policies": policies, "difference": change}


def accuracy_of(kind: str) -> Measure:
  """Accuracy over the questions of a kind."""
  return lambda m: MEASURES["accuracy"](m) if m.verdict.kind == kind else None


def compare(
  measure: Measure,
  marked: dict[str, list[Marked]],
  pair: tuple[str, str],
  how: Resampling,
) -> tuple[dict[str, Interval], Interval | None]:
  """(a measure of each policy, the pair's difference), where it can be taken."""
  asked = next(iter(marked.values()))
  rows = [i for i, m in enumerate(asked) if measure(m) is not None]
  drawn = how.only(rows)
  sums = {
    name: np.array([measure(answers[i]) for i in rows], float).reshape(-1, 2).T
    for name, answers in marked.items()
  }
  sums = {name: parts for name, parts in sums.items() if parts[1].sum()}
  stats = {
    name: bootstrap.ratio_interval(above, below, drawn)
    for name, (above, below) in sums.items()
  }
  before, after = pair
  if before == after or not {before, after} <= set(sums):
    return stats, None
  (new, below), (old, old_below) = sums[after], sums[before]
  return stats, bootstrap.ratio_difference(new, below, old, old_below, drawn)


def add_judge(
  results: Row,
  wins: Mapping[int, float],
  truths: Mapping[int, float],
  pair: tuple[str, str],
  how: Resampling,
) -> None:
  """Adds to results how often a judge finds each policy of the pair better, and how
  far that is from truth: results["judge"]["drift"] is the judge's share less truth's.

  Args:
    wins: by number of the question: 1 if the second policy wins, 0 if it loses, 1/2 if
      neither.
    truths: the same, by truth, of those of the questions of which it is known.
  """
  results["judge"] = {}
  if not wins:
    return
  rows = [i for i in wins if i in truths]
  mean = lambda values, of: bootstrap.interval(
    np.array(values, float), how.only(of)
  )._asdict()
  won = np.array(list(wins.values()))
  before, after = pair
  results["policies"][before]["judge_score"] = mean(1 - won, wins)
  results["policies"][after]["judge_score"] = mean(won, wins)
  results["difference"]["judge_score"] = mean(2 * won - 1, wins)
  if rows:
    told, true = (np.array([x[i] for i in rows]) for x in (wins, truths))
    results["judge"] |= {
      "wins": mean(told, rows),
      "truth_wins": mean(true, rows),
      "drift": mean(told - true, rows),
    }
