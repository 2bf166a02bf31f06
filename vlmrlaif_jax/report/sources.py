"""What each stage has sampled, as groups: a prompt at a step, with its answers.

Bounded: so many prompts of a source, answers of a prompt, characters of an answer.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vlmrlaif_jax.core.stage_names import split_round, title
from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.charts import even
from vlmrlaif_jax.report.files import clip, mean, read_lines, sample_files

Row: TypeAlias = dict[str, Any]

SAMPLED = ("ppo", "grpo", "grm", "dpo")  # Stages that keep samples of their steps.
STEPS = 20
FOLLOWED, OTHERS = 6, 4  # Prompts of a step: of the first one's, and its own.
PROMPTS = 24  # Of a source without steps, or of a round.
ANSWERS = 10  # Of a prompt: the best half and the worst half.
FILES = {"label": "blocks", "claims": "answers.jsonl", "eval": "answers.jsonl"}
TEXT, LONG = 1200, 2000  # Characters of an answer; of what a judge or a narrative says.


def of_stage(root: Path, name: str) -> list[Row]:
  """The source that a stage is, with its groups, the most telling first; or none."""
  kind, number = split_round(name)
  folder = root / name
  if kind in SAMPLED:
    found = list(steps_of(folder))
  elif kind == "label":
    found = labelled(folder)
  elif kind == "claims":
    found = claimed(folder, number)
  elif kind == "eval":
    found = answered(folder)
  else:
    found = []
  if not found:
    return []
  total = sum(group.pop("of", 1) for group in found)
  return [
    {
      "name": name,
      "title": title(name),
      "file": f"{name}/{FILES.get(kind, 'samples')}",
      "groups": found,
      "total": total,
      "means": step_means(folder) if kind in SAMPLED else {},
    }
  ]


# Of a stage that samples.


def steps_of(folder: Path) -> Iterator[Row]:
  """Groups of some of the steps; prompts of the first that come again stand first."""
  found = sample_files(folder)
  if not found:
    return
  kept = found if len(found) <= STEPS else even(found, STEPS)
  read = {step: grouped(read_lines(path)) for step, path in kept}
  first, *later = read.values()
  again = {group[0]["id"] for groups in later for group in groups}
  known = [group[0] for group in first if group[0]["id"] in again]
  watched = {row["id"] for row in spread(known, "kind", FOLLOWED)}
  for step, groups in read.items():
    followed = {g[0]["id"]: g for g in groups if g[0]["id"] in watched}
    for group in followed.values():  # Where it is asked twice, with the same numbers.
      yield sampled(group, step) | {"followed": True}
  for step, groups in read.items():
    groups.sort(key=lambda group: -len(troubles(group)))
    own = [g for g in groups if not is_again(g) and g[0]["id"] not in watched]
    chosen = own[:1] + spread_groups(own[1:], OTHERS - 1)
    for place, group in enumerate(chosen):
      rest = len(own) - len(chosen) if place == 0 else 0
      yield sampled(group, step) | {"of": 1 + rest}


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
  """The rows of each prompt, which stand together."""
  key = lambda row: (row["id"], row.get("again", False))
  return [list(group) for _, group in itertools.groupby(rows, key)]


def is_again(group: Sequence[Row]) -> bool:
  """Whether it is an answer to the first step's prompts anew; see samples.Again."""
  return group[0].get("again", False)


def spread(rows: Iterable[Row], key: str, count: int) -> list[Row]:
  """`count` rows, taken in turn from each value of `key`."""
  turns: dict[Any, int] = {}
  order = []
  for index, row in enumerate(rows):
    turn = turns[row.get(key)] = turns.get(row.get(key), -1) + 1
    order.append((turn, index, row))
  return [row for _, _, row in sorted(order, key=lambda item: item[:2])[:count]]


def spread_groups(groups: Sequence[list[Row]], count: int) -> list[list[Row]]:
  """Groups of prompts of all kinds."""
  rows = [{"kind": group[0].get("kind"), "group": group} for group in groups]
  return [row["group"] for row in spread(rows, "kind", count)]


def troubles(group: Sequence[Row]) -> list[Row]:
  """The answers that were cut off, or have no score."""
  return [
    row for row in group if not (row.get("has_stop", True) and row.get("valid", True))
  ]


def sampled(group: Sequence[Row], step: int) -> Row:
  """A prompt at a step of RL, or of DPO, whose rows hold all answers."""
  row = group[0]
  if "answers" in row:
    return claim_group(row, step)
  answers = [
    {
      "text": clip(each["response"], TEXT),
      "score": score_of(each),
      "terms": {k: finite(x) for k, x in (each.get("terms") or {}).items()},
      "kl": finite(each.get("kl")),
      "advantage": finite(each.get("advantage")),
      "right": each.get("truth"),
      "notes": notes(each),
    }
    for each in group
  ]
  return base(row, row["prompt"], step) | {
    **ranked(answers),
    "judge": [clip(said, LONG) for said in row.get("judge", [])],
  }


def score_of(row: Row) -> float | None:
  """The score of an answer; None of one that the judge could not score."""
  return finite(row.get("score")) if row.get("valid", True) else None


def notes(row: Row) -> list[str]:
  """What is amiss with an answer."""
  said = [] if row.get("has_stop", True) else ["cut off"]
  return said + ([] if row.get("valid", True) else ["no score: left out of the loss"])


def step_means(folder: Path) -> dict[str, Row]:
  """By step, the means over all answers that the step's own prompts had."""
  means = {}
  for step, path in sample_files(folder):
    rows = [row for row in read_lines(path) if "response" in row]
    own = [row | {"score": score_of(row)} for row in rows if not row.get("again")]
    if own:
      keys = ("score", "kl", "truth", "has_stop", "valid")
      found = {key: mean(own, key) for key in keys}
      means[str(step)] = found | {"answers": len(own)}
  return means


# Of the others.


def labelled(folder: Path) -> list[Row]:
  """Pairs that the judge was shown, kept and dropped ones in turn."""
  blocks = sorted((folder / "blocks").glob("*.jsonl"))
  rows = [row for path in blocks for row in read_lines(path) if "question" in row]
  judged = [row for row in rows if any(row["verdicts"]) or row["preference"]]
  kept = spread(judged, "outcome", PROMPTS)
  found = [label_group(row) for row in kept]
  if found:
    found[0]["of"] = 1 + len(rows) - len(found)
  return found


def label_group(row: Row) -> Row:
  mistakes = row.get("mistakes") or [None, None]
  side = {row["preference"]: "chosen"} if row["preference"] else {}
  answers = [
    {
      "name": f"Answer {number}",
      "text": clip(text, TEXT),
      "side": side.get(number, "rejected" if side else None),
      "mistakes": mistakes[number - 1],
      "notes": [] if row["stopped"][number - 1] else ["cut off"],
    }
    for number, text in enumerate(row["outputs"], 1)
  ]
  orders = zip(("1, 2", "2, 1"), row["verdicts"], strict=False)
  said = [f"Shown as ({order}): {clip(text, LONG)}" for order, text in orders]
  return base(row | {"kind": row["outcome"]}, row["question"], 0) | {
    "answers": answers,
    "judge": said,
    "narrative": clip(row["narrative"], LONG),
  }


def claimed(folder: Path, number: int) -> list[Row]:
  """Prompts of a round: those that became pairs, the others after them."""
  rows = [row for row in read_lines(folder / "answers.jsonl") if "question" in row]
  pairs: dict[str, list[tuple[int, int]]] = {}
  for pair in read_lines(folder / "preferences.jsonl"):
    id, _, places = pair["id"].rpartition(":")
    pairs.setdefault(id, []).append(tuple(map(int, places.split("-"))))
  rows.sort(key=lambda row: row["id"] not in pairs)
  found = [claim_group(row, number, pairs.get(row["id"], [])) for row in rows[:PROMPTS]]
  if found:
    found[0]["of"] = 1 + len(rows) - len(found)
  return found


def claim_group(row: Row, step: int, pairs: Sequence[tuple[int, int]] = ()) -> Row:
  """A prompt whose answers were divided into claims.

  Args:
    pairs: (chosen, rejected) answers, by number.
  """
  sides = {place: side for pair in pairs for place, side in zip(
    pair, ("chosen", "rejected"), strict=True)}  # fmt: skip
  answers = [
    {
      "text": clip(text, TEXT),
      "score": finite(row["scores"][i]),
      "side": sides.get(i),
      "mistakes": row["mistakes"][i],
      "claims": [
        [clip(said, 300), None if chance is None else bool(chance[0] > chance[1])]
        for said, chance in zip(row["claims"][i], row["chances"][i], strict=True)
      ],
      "notes": [] if row["stopped"][i] else ["cut off"],
    }
    for i, text in enumerate(row["answers"])
  ]
  made = base(row | {"kind": "paired" if pairs else None}, row["question"], step)
  return made | ranked(answers)


def answered(folder: Path) -> list[Row]:
  """Questions of the evaluation, of every outcome and kind."""
  rows = read_lines(folder / "answers.jsonl")
  marks = lambda row: tuple(each.get("correct") for _, each in policies(row))
  rows = [row | {"marks": marks(row)} for row in rows]
  changed = [row for row in rows if len(set(row["marks"])) > 1]
  chosen = spread(changed, "marks", PROMPTS * 2 // 3)
  rest = [row for row in rows if len(set(row["marks"])) == 1]
  chosen += spread(rest, "kind", PROMPTS - len(chosen))
  found = [answer_group(row) for row in chosen]
  if found:
    found[0]["of"] = 1 + len(rows) - len(found)
  return found


def answer_group(row: Row) -> Row:
  rewards = row.get("reward") or {}
  answers = [
    {
      "name": name.upper(),
      "text": clip(each["text"], TEXT),
      "score": finite(rewards.get(name)),
      "right": each.get("correct"),
      "notes": [f"not in the video: {said}" for said in each.get("unsupported") or []],
    }
    for name, each in policies(row)
  ]
  made = base(row, row["question"], 0)
  return made | {"answers": answers, "truth": clip(row["truth"]), "in_order": True}


def policies(row: Row) -> list[tuple[str, Row]]:
  """What each policy answered; the best of n answers of one is none."""
  said = [(key, x) for key, x in row.items() if isinstance(x, dict) and "text" in x]
  return [(name, each) for name, each in said if "@" not in name]


# Common.


def base(row: Row, question: str, step: int) -> Row:
  return {
    "id": row["id"],
    "step": step,
    "kind": row.get("kind"),
    "question": clip(question, TEXT),
    "video": row.get("video"),
  }


def ranked(answers: Sequence[Row]) -> Row:
  """Answers by score, the best first, what is the same told once; at most ANSWERS."""
  told: dict[str, Row] = {}
  for answer in answers:
    key = json.dumps([answer["text"], answer.get("score")])
    known = told.setdefault(key, answer | {"count": 0})
    known["count"] += 1
    known["side"] = known.get("side") or answer.get("side")
  low = -float("inf")
  value = lambda answer: low if answer.get("score") is None else answer["score"]
  order = sorted(told.values(), key=value, reverse=True)
  hidden = max(len(order) - ANSWERS, 0)
  middle = ANSWERS // 2
  return {"answers": order[:middle] + order[middle + hidden :], "hidden": hidden}


def finite(x: Any) -> float | None:
  """A number that JSON and the page can show, in five digits; None for another."""
  return float(f"{float(x):.5g}") if is_number(x) else None
