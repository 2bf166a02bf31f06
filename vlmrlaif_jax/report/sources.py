"""Collects the samples of each stage as groups: the answers to one prompt at one step.

The number of prompts per source, of answers per prompt and of characters per answer is
limited.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import list_sample_files, split_round
from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.charts import select_evenly
from vlmrlaif_jax.report.files import (
  average_column,
  clip_text,
  read_rows,
  read_stage_facts,
)

MAX_STEPS = 20  # Steps of a source.
SIDES = ("chosen", "rejected")
MAX_FOLLOWED = 6  # Prompts of a step that recur at other steps.
MAX_OTHERS = 4  # Other prompts of a step.
MAX_PROMPTS = 24  # Prompts of a source without steps, or of a round.
MAX_ANSWERS = 10  # Answers to a prompt: the best half and the worst half.
MAX_ANSWER_CHARS = 1200  # Characters of an answer.
MAX_NOTE_CHARS = 2000  # Characters of a judge's reply or of a narrative.

_T = TypeVar("_T")
# Groups to show, the most relevant first, and the number of all prompts.
GroupsAndTotal: TypeAlias = tuple[list[JsonRow], int]


def make_stage_source(root: Path, name: str) -> list[JsonRow]:
  """Returns the source of a stage in a list, or [] for a stage without samples."""
  folder, (kind, number) = root / name, split_round(name)
  readers = (
    ("samples", collect_steps),
    ("blocks", collect_labels),
    ("answers.jsonl", collect_claims),
    ("answers.jsonl", collect_evaluation),
  )
  for file, read in readers:
    content = read(folder)
    if not content[0]:
      continue
    if read is collect_claims and number:  # The rounds are the steps of one source.
      title = f"{kind.capitalize()}, by round"
      source = make_source(kind, title, f"{kind}_N/{file}", content)
      return [source | {"by_round": True}]
    title = read_stage_facts(root, name).title
    source = make_source(name, title, f"{name}/{file}", content)
    return [source | {"means": average_steps(folder)}]
  return []


def make_source(name: str, title: str, file: str, content: GroupsAndTotal) -> JsonRow:
  """Returns a source of the viewer."""
  groups, total = content
  fields = {"name": name, "title": title, "file": file, "by_round": False, "means": {}}
  return fields | {"groups": groups, "total": total}


# Rollouts.


def collect_steps(folder: Path) -> GroupsAndTotal:
  """Returns groups of selected steps, first those of prompts that recur."""
  files = select_evenly(list_sample_files(folder), MAX_STEPS)
  by_step = {step: group_by_prompt(read_rows(path)) for step, path in files}
  rows = {group[0]["id"]: group[0] for groups in by_step.values() for group in groups}
  get_ids = lambda groups: dict.fromkeys(group[0]["id"] for group in groups)
  steps = Counter(id for groups in by_step.values() for id in get_ids(groups))
  recurring = [rows[id] for id, count in steps.most_common() if count > 1]
  watched = select_across(recurring, get_question_kind, MAX_FOLLOWED)
  watched_ids = {row["id"] for row in watched}
  followed, others = [], []
  for step, groups in by_step.items():
    rest = [group for group in groups if group[0]["id"] not in watched_ids]
    rest.sort(key=lambda group: -sum(bool(list_faults(row)) for row in group))
    get_kind = lambda group: get_question_kind(group[0])
    selected = rest[:1] + select_across(rest[1:], get_kind, MAX_OTHERS - 1)
    others += [make_sampled_group(group, step) for group in selected]
    watched_groups = [group for group in groups if group[0]["id"] in watched_ids]
    followed += [make_sampled_group(group, step) for group in watched_groups]
  followed = [group | {"followed": True} for group in followed]
  return followed + others, sum(map(len, by_step.values()))


def group_by_prompt(rows: Sequence[JsonRow]) -> list[list[JsonRow]]:
  """Returns the rows of each prompt, which are consecutive."""
  return [list(group) for _, group in itertools.groupby(rows, lambda row: row["id"])]


def get_question_kind(row: JsonRow) -> Any:
  """Returns the kind of a row's question, None without one."""
  return row.get("kind")


def select_across(
  items: Iterable[_T], key: Callable[[_T], Any], count: int
) -> list[_T]:
  """Returns `count` items, selected in turn from each value of `key`."""
  turns: Counter[Any] = Counter()
  order = []
  for index, item in enumerate(items):
    order.append((turns[key(item)], index, item))
    turns[key(item)] += 1
  return [item for _, _, item in sorted(order, key=lambda each: each[:2])[:count]]


def make_sampled_group(group: Sequence[JsonRow], step: int) -> JsonRow:
  """Returns the group of a prompt at a step of RL or DPO."""
  row = group[0]
  if "answers" in row:
    return make_claim_group(row, step)
  return make_base_group(row, row["prompt"], step) | {
    **rank_answers([make_answer(each) for each in group]),
    "judge": [clip_text(reply, MAX_NOTE_CHARS) for reply in row.get("judge", [])],
  }


def make_answer(row: JsonRow) -> JsonRow:
  """Returns a sampled answer with its score, the score's terms and its faults."""
  return {
    "text": clip_text(row["response"], MAX_ANSWER_CHARS),
    "score": get_score(row),
    "terms": round_terms(row, "terms"),
    "raw_terms": round_terms(row, "raw_terms"),
    "kl": round_finite(row.get("kl")),
    "advantage": round_finite(row.get("advantage")),
    "right": row.get("truth"),
    "notes": list_faults(row),
  }


def round_terms(row: JsonRow, key: str) -> dict[str, float | None]:
  """Returns the terms of a row's score, which older rows may lack."""
  return {name: round_finite(x) for name, x in (row.get(key) or {}).items()}


def get_score(row: JsonRow) -> float | None:
  """Returns the score of an answer, None if the judge could not score it."""
  return round_finite(row.get("score")) if row.get("valid", True) else None


def list_faults(row: JsonRow) -> list[str]:
  """Returns the faults of an answer."""
  faults = [] if row.get("has_stop", True) else ["cut off"]
  return faults + ([] if row.get("valid", True) else ["no score: left out of the loss"])


def average_steps(folder: Path) -> dict[str, JsonRow]:
  """Returns the means over all answers of each shown step."""
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


# Labels, claims and evaluations.


def collect_labels(folder: Path) -> GroupsAndTotal:
  """Returns judged pairs, in turn from each outcome."""
  blocks = sorted((folder / "blocks").glob("*.jsonl"))
  rows = [row for path in blocks for row in read_rows(path) if "question" in row]
  judged = [row for row in rows if any(row["verdicts"]) or row["preference"]]
  selected = select_across(judged, lambda row: row["outcome"], MAX_PROMPTS)
  return [make_label_group(row) for row in selected], len(rows)


def make_label_group(row: JsonRow) -> JsonRow:
  """Returns the group of a judged pair."""
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
  name = lambda order: f"Answers in the order {order}"
  replies = [f"{name(order)}: {clip_text(x, MAX_NOTE_CHARS)}" for order, x in orders]
  return make_base_group(row | {"kind": row["outcome"]}, row["question"], 0) | {
    "answers": answers,
    "judge": replies,
    "narrative": clip_text(row["narrative"], MAX_NOTE_CHARS),
  }


def collect_claims(folder: Path) -> GroupsAndTotal:
  """Returns the prompts of a round, first those with preference pairs."""
  rows = [row for row in read_rows(folder / "answers.jsonl") if "claims" in row]
  pairs: dict[str, list[tuple[int, int]]] = {}
  for pair in read_rows(folder / "preferences.jsonl") if rows else []:
    id, _, places = pair["id"].rpartition(":")
    first, second = places.split("-")
    pairs.setdefault(id, []).append((int(first), int(second)))
  rows.sort(key=lambda row: row["id"] not in pairs)
  _, number = split_round(folder.name)
  make = lambda row: make_claim_group(row, number, pairs.get(row["id"], []))
  return [make(row) for row in rows[:MAX_PROMPTS]], len(rows)


def make_claim_group(
  row: JsonRow, step: int, pairs: Sequence[tuple[int, int]] = ()
) -> JsonRow:
  """Returns the group of a prompt whose answers were divided into claims.

  Args:
    row: A row of the answers.
    step: The step or round.
    pairs: Indices of each pair's chosen and rejected answer.
  """
  sides = {
    index: side for pair in pairs for index, side in zip(pair, SIDES, strict=True)
  }
  answers = [
    {
      "text": clip_text(text, MAX_ANSWER_CHARS),
      "score": round_finite(row["scores"][i]),
      "side": sides.get(i),
      "mistakes": row["mistakes"][i],
      "claims": [
        [clip_text(claim, 300), None if p is None else bool(p[0] > p[1])]
        for claim, p in zip(row["claims"][i], row["chances"][i], strict=True)
      ],
      "notes": [] if row["stopped"][i] else ["cut off"],
    }
    for i, text in enumerate(row["answers"])
  ]
  row = row | {"kind": "paired" if pairs else None}
  return make_base_group(row, row["question"], step) | rank_answers(answers)


def collect_evaluation(folder: Path) -> GroupsAndTotal:
  """Returns questions of the evaluation, with every outcome and kind."""
  rows = [
    row for row in read_rows(folder / "answers.jsonl") if list_policy_answers(row)
  ]
  marks = lambda row: tuple(each.get("correct") for _, each in list_policy_answers(row))
  selected = select_varied(rows, marks, get_question_kind)
  return [make_answer_group(row) for row in selected], len(rows)


def select_varied(
  items: Sequence[_T], marks: Callable[[_T], Sequence[Any]], kind: Callable[[_T], Any]
) -> list[_T]:
  """Returns MAX_PROMPTS items, first those with different marks and then each kind."""
  different = [item for item in items if len(set(marks(item))) > 1]
  equal = [item for item in items if len(set(marks(item))) == 1]
  selected = select_across(different, marks, MAX_PROMPTS * 2 // 3)
  return selected + select_across(equal, kind, MAX_PROMPTS - len(selected))


def make_answer_group(row: JsonRow) -> JsonRow:
  """Returns the group of a question of the evaluation."""
  rewards = row.get("reward") or {}
  answers = [
    {
      "name": name.upper(),
      "text": clip_text(each["text"], MAX_ANSWER_CHARS),
      "score": round_finite(rewards.get(name)),
      "right": each.get("correct"),
      "notes": [f"not in the video: {text}" for text in each.get("unsupported") or []],
    }
    for name, each in list_policy_answers(row)
  ]
  group = make_base_group(row, row["question"], 0) | {"answers": answers}
  return group | {"truth": clip_text(row["truth"]), "in_order": True}


def list_policy_answers(row: JsonRow) -> list[tuple[str, JsonRow]]:
  """Returns each policy's answer; best-of-n answers are left out."""
  answers = [(key, x) for key, x in row.items() if isinstance(x, dict) and "text" in x]
  return [(name, each) for name, each in answers if "@" not in name]


# Groups.


def make_base_group(row: JsonRow, question: str, step: int) -> JsonRow:
  """Returns the fields that all groups have."""
  return {
    "id": row["id"],
    "step": step,
    "kind": row.get("kind"),
    "question": clip_text(question, MAX_ANSWER_CHARS),
    "video": row.get("video"),
  }


def rank_answers(answers: Sequence[JsonRow]) -> JsonRow:
  """Returns at most MAX_ANSWERS distinct answers, best score first.

  If there are more, the middle ones are left out.
  """
  distinct: dict[str, JsonRow] = {}
  for answer in answers:
    key = json.dumps([answer["text"], answer.get("score")])
    entry = distinct.setdefault(key, answer | {"count": 0})
    entry["count"] += 1
    entry["side"] = entry.get("side") or answer.get("side")
  low = -float("inf")
  get_value = lambda answer: low if answer.get("score") is None else answer["score"]
  order = sorted(distinct.values(), key=get_value, reverse=True)
  hidden = max(len(order) - MAX_ANSWERS, 0)
  middle = MAX_ANSWERS // 2
  return {"answers": order[:middle] + order[middle + hidden :], "hidden": hidden}


def round_finite(x: Any) -> float | None:
  """Returns a finite number with five significant digits, None for another value."""
  return float(f"{float(x):.5g}") if is_number(x) else None
