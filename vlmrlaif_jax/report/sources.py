"""What each stage has sampled, as groups: a prompt at a step, with its answers.

Bounded: so many prompts of a source, answers of a prompt, characters of an answer.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.charts import select_evenly
from vlmrlaif_jax.report.files import (
  average_column,
  clip_text,
  list_sample_files,
  read_rows,
  read_stage_facts,
)

MAX_STEPS = 20  # That a page shows.
SIDES = ("chosen", "rejected")
FOLLOWED, OTHERS = 6, 4  # Prompts of a step: those of several steps, and its own.
MAX_PROMPTS = 24  # Of a source without steps, or of a round.
MAX_ANSWERS = 10  # Of a prompt: the best half and the worst half.
MAX_ANSWER_CHARS, MAX_NOTE_CHARS = (
  1200,
  2000,
)  # Characters of an answer; of what a judge or a narrative says.

T = TypeVar("T")
# Groups to show, the most telling first, and the number of prompts that there are.
GroupsAndTotal: TypeAlias = tuple[list[JsonRow], int]


def make_stage_source(root: Path, name: str) -> list[JsonRow]:
  """Returns the source that a stage is, by the files that it has; or none."""
  folder, (kind, number) = root / name, split_round(name)
  readers = (
    ("samples", collect_steps),
    ("blocks", collect_labels),
    ("answers.jsonl", collect_claims),
    ("answers.jsonl", collect_evaluation),
  )
  for file, read in readers:
    found = read(folder)
    if (
      found[0] and read is collect_claims and number
    ):  # Rounds are the steps of one source.
      made = make_source(
        kind, f"{kind.capitalize()}, by round", f"{kind}_N/{file}", found
      )
      return [made | {"by_round": True}]
    if found[0]:
      made = make_source(
        name, read_stage_facts(root, name).title, f"{name}/{file}", found
      )
      return [made | {"means": average_steps(folder)}]
  return []


def make_source(name: str, title: str, file: str, found: GroupsAndTotal) -> JsonRow:
  """Returns a source of the viewer."""
  groups, total = found
  place = {"name": name, "title": title, "file": file, "by_round": False, "means": {}}
  return place | {"groups": groups, "total": total}


# Of a stage that samples.


def collect_steps(folder: Path) -> GroupsAndTotal:
  """Returns groups of some of the steps; those of prompts of several steps first."""
  files = select_evenly(list_sample_files(folder), MAX_STEPS)
  read = {step: group_by_prompt(read_rows(path)) for step, path in files}
  rows = {group[0]["id"]: group[0] for groups in read.values() for group in groups}
  steps = Counter(
    id for groups in read.values() for id in dict.fromkeys(g[0]["id"] for g in groups)
  )
  several = [rows[id] for id, count in steps.most_common() if count > 1]
  watched = {row["id"] for row in select_across(several, get_question_kind, FOLLOWED)}
  followed, others = [], []
  for step, groups in read.items():
    made = [
      make_sampled_group(group, step) for group in groups if group[0]["id"] in watched
    ]
    followed += [group | {"followed": True} for group in made]
    own = [group for group in groups if group[0]["id"] not in watched]
    own.sort(key=lambda group: -sum(bool(list_faults(row)) for row in group))
    chosen = own[:1] + select_across(
      own[1:], lambda group: get_question_kind(group[0]), OTHERS - 1
    )
    others += [make_sampled_group(group, step) for group in chosen]
  return followed + others, sum(map(len, read.values()))


def group_by_prompt(rows: Sequence[JsonRow]) -> list[list[JsonRow]]:
  """Returns the rows of each prompt, which stand together."""
  return [list(group) for _, group in itertools.groupby(rows, lambda row: row["id"])]


def get_question_kind(row: JsonRow) -> Any:
  """Returns the kind of a row's question, None if it is not known."""
  return row.get("kind")


def select_across(items: Iterable[T], key: Callable[[T], Any], count: int) -> list[T]:
  """Returns `count` items, taken in turn from each value of `key`."""
  turns: Counter[Any] = Counter()
  order = []
  for index, item in enumerate(items):
    order.append((turns[key(item)], index, item))
    turns[key(item)] += 1
  return [item for _, _, item in sorted(order, key=lambda each: each[:2])[:count]]


def make_sampled_group(group: Sequence[JsonRow], step: int) -> JsonRow:
  """Returns a prompt at a step of RL, or of DPO, whose rows hold all answers."""
  row = group[0]
  if "answers" in row:
    return make_claim_group(row, step)
  return make_base_group(row, row["prompt"], step) | {
    **rank_answers([make_answer(each) for each in group]),
    "judge": [clip_text(said, MAX_NOTE_CHARS) for said in row.get("judge", [])],
  }


def make_answer(row: JsonRow) -> JsonRow:
  """Returns a sampled answer with its score, the score's terms, and its faults."""
  return {
    "text": clip_text(row["response"], MAX_ANSWER_CHARS),
    "score": get_score(row),
    "terms": {k: round_finite(x) for k, x in (row.get("terms") or {}).items()},
    "kl": round_finite(row.get("kl")),
    "advantage": round_finite(row.get("advantage")),
    "right": row.get("truth"),
    "notes": list_faults(row),
  }


def get_score(row: JsonRow) -> float | None:
  """The score of an answer; None of one that the judge could not score."""
  return round_finite(row.get("score")) if row.get("valid", True) else None


def list_faults(row: JsonRow) -> list[str]:
  """What is amiss with an answer."""
  said = [] if row.get("has_stop", True) else ["cut off"]
  return said + ([] if row.get("valid", True) else ["no score: left out of the loss"])


def average_steps(folder: Path) -> dict[str, JsonRow]:
  """Returns the means over all answers of each step that is shown."""
  means = {}
  for step, path in select_evenly(list_sample_files(folder), MAX_STEPS):
    rows = [row for row in read_rows(path) if "response" in row]
    rows = [row | {"score": get_score(row)} for row in rows]
    if rows:
      keys = ("score", "kl", "truth", "has_stop", "valid")
      means[str(step)] = {key: average_column(rows, key) for key in keys} | {
        "answers": len(rows)
      }
  return means


# Of the others.


def collect_labels(folder: Path) -> GroupsAndTotal:
  """Returns pairs that the judge was shown, kept and dropped ones in turn."""
  blocks = sorted((folder / "blocks").glob("*.jsonl"))
  rows = [row for path in blocks for row in read_rows(path) if "question" in row]
  judged = [row for row in rows if any(row["verdicts"]) or row["preference"]]
  kept = select_across(judged, lambda row: row["outcome"], MAX_PROMPTS)
  return [make_label_group(row) for row in kept], len(rows)


def make_label_group(row: JsonRow) -> JsonRow:
  mistakes = row.get("mistakes") or [None, None]
  side = {row["preference"]: "chosen"} if row["preference"] else {}
  answers = [
    {
      "name": f"Answer {number}",
      "text": clip_text(text, MAX_ANSWER_CHARS),
      "side": side.get(number, "rejected" if side else None),
      "mistakes": mistakes[number - 1],
      "notes": [] if row["stopped"][number - 1] else ["cut off"],
    }
    for number, text in enumerate(row["outputs"], 1)
  ]
  orders = zip(("1, 2", "2, 1"), row["verdicts"], strict=False)
  said = [
    f"Shown as ({order}): {clip_text(text, MAX_NOTE_CHARS)}" for order, text in orders
  ]
  return make_base_group(row | {"kind": row["outcome"]}, row["question"], 0) | {
    "answers": answers,
    "judge": said,
    "narrative": clip_text(row["narrative"], MAX_NOTE_CHARS),
  }


def collect_claims(folder: Path) -> GroupsAndTotal:
  """Returns prompts of a round: those that became pairs, the others after them."""
  rows = [row for row in read_rows(folder / "answers.jsonl") if "claims" in row]
  pairs: dict[str, list[tuple[int, int]]] = {}
  for pair in read_rows(folder / "preferences.jsonl") if rows else []:
    id, _, places = pair["id"].rpartition(":")
    first, second = places.split("-")
    pairs.setdefault(id, []).append((int(first), int(second)))
  rows.sort(key=lambda row: row["id"] not in pairs)
  _, number = split_round(folder.name)
  made = [
    make_claim_group(row, number, pairs.get(row["id"], []))
    for row in rows[:MAX_PROMPTS]
  ]
  return made, len(rows)


def make_claim_group(
  row: JsonRow, step: int, pairs: Sequence[tuple[int, int]] = ()
) -> JsonRow:
  """A prompt whose answers were divided into claims.

  Args:
    pairs: (chosen, rejected) answers, by number.
  """
  sides = {
    place: side for pair in pairs for place, side in zip(pair, SIDES, strict=True)
  }
  answers = [
    {
      "text": clip_text(text, MAX_ANSWER_CHARS),
      "score": round_finite(row["scores"][i]),
      "side": sides.get(i),
      "mistakes": row["mistakes"][i],
      "claims": [
        [clip_text(said, 300), None if chance is None else bool(chance[0] > chance[1])]
        for said, chance in zip(row["claims"][i], row["chances"][i], strict=True)
      ],
      "notes": [] if row["stopped"][i] else ["cut off"],
    }
    for i, text in enumerate(row["answers"])
  ]
  made = make_base_group(
    row | {"kind": "paired" if pairs else None}, row["question"], step
  )
  return made | rank_answers(answers)


def collect_evaluation(folder: Path) -> GroupsAndTotal:
  """Returns questions of the evaluation, of every outcome and kind."""
  rows = [
    row for row in read_rows(folder / "answers.jsonl") if list_policy_answers(row)
  ]
  marks = lambda row: tuple(each.get("correct") for _, each in list_policy_answers(row))
  chosen = select_varied(rows, marks, get_question_kind)
  return [make_answer_group(row) for row in chosen], len(rows)


def select_varied(
  items: Sequence[T], marks: Callable[[T], Sequence[Any]], kind: Callable[[T], Any]
) -> list[T]:
  """Returns PROMPTS items: first those whose marks differ, then some of each kind."""
  unlike = [item for item in items if len(set(marks(item))) > 1]
  alike = [item for item in items if len(set(marks(item))) == 1]
  chosen = select_across(unlike, marks, MAX_PROMPTS * 2 // 3)
  return chosen + select_across(alike, kind, MAX_PROMPTS - len(chosen))


def make_answer_group(row: JsonRow) -> JsonRow:
  rewards = row.get("reward") or {}
  answers = [
    {
      "name": name.upper(),
      "text": clip_text(each["text"], MAX_ANSWER_CHARS),
      "score": round_finite(rewards.get(name)),
      "right": each.get("correct"),
      "notes": [f"not in the video: {said}" for said in each.get("unsupported") or []],
    }
    for name, each in list_policy_answers(row)
  ]
  made = make_base_group(row, row["question"], 0)
  return made | {"answers": answers, "truth": clip_text(row["truth"]), "in_order": True}


def list_policy_answers(row: JsonRow) -> list[tuple[str, JsonRow]]:
  """What each policy answered; the best of n answers of one is none."""
  said = [(key, x) for key, x in row.items() if isinstance(x, dict) and "text" in x]
  return [(name, each) for name, each in said if "@" not in name]


# Common.


def make_base_group(row: JsonRow, question: str, step: int) -> JsonRow:
  return {
    "id": row["id"],
    "step": step,
    "kind": row.get("kind"),
    "question": clip_text(question, MAX_ANSWER_CHARS),
    "video": row.get("video"),
  }


def rank_answers(answers: Sequence[JsonRow]) -> JsonRow:
  """Answers by score, the best first, what is the same told once; at most ANSWERS."""
  told: dict[str, JsonRow] = {}
  for answer in answers:
    key = json.dumps([answer["text"], answer.get("score")])
    known = told.setdefault(key, answer | {"count": 0})
    known["count"] += 1
    known["side"] = known.get("side") or answer.get("side")
  low = -float("inf")
  value = lambda answer: low if answer.get("score") is None else answer["score"]
  order = sorted(told.values(), key=value, reverse=True)
  hidden = max(len(order) - MAX_ANSWERS, 0)
  middle = MAX_ANSWERS // 2
  return {"answers": order[:middle] + order[middle + hidden :], "hidden": hidden}


def round_finite(x: Any) -> float | None:
  """A number that JSON and the page can show, in five digits; None for another."""
  return float(f"{float(x):.5g}") if is_number(x) else None
