"""AMBER (Wang et al. 2023, 2311.07397): descriptions, and questions of yes or no.

As AMBER's own script, but by rules alone, so that figures are near and not the same:
a mention is any word of relation.json, and not a noun that NLTK finds; words that only
resemble each other (spaCy's vectors) are different; and F1 is exact, where the script
takes it of rounded values. Of an answer to yes or no its first word is read. One that
is neither is wrong, as in the script, and "odd" is the share of those.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks import chair, protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  ScoredCase,
)

SOURCE = protocol.Source(
  "AMBER",
  "https://github.com/junyangwang0410/AMBER (data; its README links the images)",
  """  QUESTIONS/             the folder data
    annotations.json     [{"id": 1, "type": "generative", "truth": ["dog", ...],
                           "hallu": ["cat", ...]},
                          {"id": 1005, "type": "discriminative-hallucination",
                           "truth": "yes"}, ...]; further types:
                         discriminative-attribute-state, -number, -action; any other is
                         of relation
    query/query_all.json [{"id": 1, "image": "AMBER_1.jpg", "query": ...}, ...]
    relation.json        {"dog": ["puppy", ...], ...}
    safe_words.txt       a word a line that never counts as wrong
  VIDEOS/                a folder of the images, by "image" """,
)
GENERATIVE = "generative"
SHARES = (
  *("chair", "cover", "hal", "cog"),
  *("precision", "recall", "f1", "odd"),
)


class AmberItem(NamedTuple):
  """A query and its annotation."""

  question: BenchmarkQuestion
  kind: str  # GENERATIVE, "existence", "attribute" or "relation".
  truth: bool | tuple[str, ...]  # Yes or no; of a description, the objects there.
  hallu: tuple[str, ...] = ()  # Of a description: what is likely to be made up.


class WordTable(NamedTuple):
  """What words mean the same."""

  table: chair.SynonymTable  # Each word for itself, in either number.
  related: dict[str, list[str]]
  safe: frozenset[str]


# The files.


def load(config: ConfigDict) -> list[AmberItem]:
  """The items of the folder, in the order of the queries."""
  folder = pathlib.Path(config.questions)
  related = read_words(folder).related
  path, queries = folder / "annotations.json", folder / "query" / "query_all.json"
  rows = protocol.read_records_list(path, ("id", "type", "truth"), SOURCE, once=("id",))
  notes, items = {row["id"]: row for row in rows}, []
  for row in protocol.read_records_list(
    queries, ("id", "image", "query"), SOURCE, ("id",)
  ):
    if row["id"] not in notes:
      raise ValueError(f"{path} has no id {row['id']}, which {queries} asks")
    asked = protocol.make_question(config, row["id"], row["image"], row["query"])
    items.append(_item(asked, notes[row["id"]], related, path))
  return items


def _item(asked, note, related, path) -> AmberItem:
  kind, truth = note["type"], note["truth"]
  if kind == GENERATIVE:
    there, hallu = (
      tuple(map(_plain, words)) for words in (truth, note.get("hallu", ()))
    )
    unknown = [word for word in (*there, *hallu) if word not in related]
    if unknown:
      raise ValueError(f"relation.json has no {unknown}, which {path} names")
    return AmberItem(asked, kind, there, hallu)
  if truth not in ("yes", "no"):
    raise ValueError(
      f'{path}, id {asked.id}: truth must be "yes" or "no", not {truth!r}: '
      + SOURCE.describe()
    )
  return AmberItem(asked, _kind(kind), truth == "yes")


def _kind(named: str) -> str:
  if named == "discriminative-hallucination":
    return "existence"
  return "attribute" if named.startswith("discriminative-attribute") else "relation"


def read_words(folder: pathlib.Path) -> WordTable:
  """What relation.json and safe_words.txt say."""
  paths = folder / "relation.json", folder / "safe_words.txt"
  for path in paths:
    if not path.is_file():
      raise FileNotFoundError(f"no file at {path}: {SOURCE.describe()}")
  try:
    told = json.loads(paths[0].read_bytes())
    related = {_plain(name): list(map(_plain, same)) for name, same in told.items()}
  except (AttributeError, TypeError, ValueError) as error:
    raise ValueError(f"{paths[0]} is not AMBER's ({error}): {SOURCE.describe()}") from None
  words = {word for name, same in related.items() for word in (name, *same)}
  table = chair.make_synonym_table({word: [word] for word in sorted(words) if word})
  safe = frozenset(map(_plain, paths[1].read_text().splitlines()))
  return WordTable(table, related, safe)


def _plain(word: str) -> str:
  return " ".join(chair.split_words(word))


# Scores.


def run(
  items: Sequence[AmberItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns measures by rules; the judge is not asked.

  Of descriptions: "chair", mentions of what is not there, of all; "cover", objects
  that are mentioned, of those there; "hal", descriptions that make anything up;
  "cog", mentioned of what is likely to be made up.
  Of yes or no: "accuracy", "precision", "recall" and "f1" of "no", and "odd"; of
  each kind as "KIND.accuracy" and so on.
  """
  words = read_words(pathlib.Path(config.questions))
  texts = model.answer([item.question for item in items])
  return [_scored(item, text, words) for item, text in zip(items, texts, strict=True)]


def _scored(item: AmberItem, text: str | None, words: WordTable) -> ScoredCase:
  if text is None:
    return protocol.make_ratio_case(item.question, None)
  if not isinstance(item.truth, bool):
    found = tally_description(item.truth, item.hallu, text, words)
    return protocol.make_ratio_case(item.question, found)
  found = tally_answer(item.truth, parse_first_word(text))
  each = {f"{item.kind}.{name}": tally for name, tally in found.items()}
  return protocol.make_ratio_case(item.question, found | each, "yes" if item.truth else "no")


def tally_description(
  truth: Sequence[str], hallu: Sequence[str], text: str, words: WordTable
) -> dict[str, tuple[int, int]]:
  """Returns what a description adds to each measure, above and below.

  Args:
    truth: the objects there.
    hallu: objects that are likely to be made up.
    text: the description.
    words: what words mean the same.
  """
  said = chair.find_mentions(text, words.table)
  there, likely = (_meant(names, words.related) for names in (truth, hallu))
  covered = {there[word] for word in said if word in there and word not in words.safe}
  wrong = [word for word in said if word not in there and word not in words.safe]
  made_up = {likely[word] for word in wrong if word in likely}
  return {
    "chair": (len(wrong), len(said)),
    "cover": (len(covered), len(truth)),
    "hal": (bool(wrong), 1),
    "cog": (len(made_up), len(hallu)),
  }


def _meant(
  names: Sequence[str], related: Mapping[str, Sequence[str]]
) -> dict[str, str]:
  """Word -> the one name that it covers: the first, and related words go before."""
  meant: dict[str, str] = {}
  for name in names:
    for word in related[name]:
      meant.setdefault(word, name)
  for name in names:
    meant.setdefault(name, name)
  return meant


def parse_first_word(text: str) -> bool | None:
  """What the first word of an answer says; None for neither yes nor no."""
  first = chair.split_words(text)[:1]
  meant: dict[tuple[str, ...], bool] = {("yes",): True, ("no",): False}
  return meant.get(first)


def tally_answer(truth: bool, said: bool | None) -> dict[str, tuple[int, int]]:
  """What an answer adds to each measure, above and below; "no" is the positive."""
  said_no = said is False
  found = said_no and not truth
  return {
    "accuracy": (said is truth, 1),
    "precision": (found, said_no),
    "recall": (found, not truth),
    "f1": (2 * found, said_no + (not truth)),
    "odd": (said is None, 1),
  }


BENCHMARKS = (
  protocol.Benchmark(
    "amber", SOURCE, load, run, scoring="rules", shares=SHARES, world=world_files.write_amber
  ),
)
