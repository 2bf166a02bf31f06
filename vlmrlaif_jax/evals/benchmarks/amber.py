"""Scores AMBER (Wang et al. 2023, 2311.07397): descriptions and yes-no questions.

Follows AMBER's own script, with rules in place of its NLP models. The scores are near
the script's, but differ in three points. A mention is any word of relation.json, where
the script takes nouns from NLTK. Words match only if relation.json relates them, where
the script also compares spaCy's vectors. F1 is exact, where the script computes it from
rounded values.

Only the first word of a yes-no answer counts, or the word after "Answer:". Any word
other than yes or no is wrong, as in the script; "odd" is the share of such answers.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals.benchmarks import chair, protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  ScoredCase,
)
from vlmrlaif_jax.evals.question_files import get_text, load_items
from vlmrlaif_jax.feedback.replies.options import parse_yes_no

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
  """A query with its annotation."""

  question: BenchmarkQuestion
  kind: str  # GENERATIVE, "existence", "attribute" or "relation".
  truth: bool | tuple[str, ...]  # The right answer, or the objects in the image.
  hallu: tuple[str, ...] = ()  # Objects that a description is likely to make up.


class WordTable(NamedTuple):
  """Words with the same meaning, and words without an effect."""

  table: chair.SynonymTable  # Maps each word, singular or plural, to itself.
  related: dict[str, list[str]]  # Words that count as each name.
  safe: frozenset[str]  # Words that are never wrong.


# Files.


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[AmberItem]:
  """Loads the items of the folder, in the order of the queries.

  `problems` receives the skipped rows.
  """
  folder = pathlib.Path(config.questions)
  related = read_words(folder).related
  path, queries = folder / "annotations.json", folder / "query" / "query_all.json"
  keys = ("id", "type", "truth")
  rows = load_items(path, SOURCE, lambda _, row: row, problems, keys=keys, once=("id",))
  notes = {str(row["id"]): row for row in rows}

  def make(number: int, row: dict[str, Any]) -> AmberItem:
    id = str(row["id"])
    if id not in notes:
      raise ValueError(f"{path.name} has no usable record of id {id}")
    image, text = get_text(row, ("image",)), get_text(row, ("query",))
    question = protocol.make_question(config, id, image, text)
    return _make_item(question, notes[id], related)

  keys = ("id", "image", "query")
  return load_items(queries, SOURCE, make, problems, keys=keys, once=("id",))


def _make_item(
  question: BenchmarkQuestion, note: Mapping[str, Any], related: Mapping[str, Any]
) -> AmberItem:
  kind, truth = get_text(note, ("type",)), note["truth"]
  if kind == GENERATIVE:
    lists = (truth, note.get("hallu", ()))
    present, hallu = (tuple(map(_normalize, words)) for words in lists)
    unknown = [word for word in (*present, *hallu) if word not in related]
    if unknown:
      raise ValueError(f"relation.json has no {unknown}, which annotations.json has")
    return AmberItem(question, kind, present, hallu)
  if truth not in ("yes", "no"):
    raise ValueError(f'truth must be "yes" or "no", got {truth!r}')
  return AmberItem(question, _get_kind(kind), truth == "yes")


def _get_kind(type: str) -> str:
  if type == "discriminative-hallucination":
    return "existence"
  return "attribute" if type.startswith("discriminative-attribute") else "relation"


def read_words(folder: pathlib.Path) -> WordTable:
  """Reads relation.json and safe_words.txt.

  Raises:
    FileNotFoundError: One of the files is missing.
    ValueError: relation.json has another layout.
  """
  paths = folder / "relation.json", folder / "safe_words.txt"
  for path in paths:
    if not path.is_file():
      raise FileNotFoundError(f"no file at {path}: {SOURCE.describe()}")
  try:
    content = read_json(paths[0])
    related = {_normalize(k): [*map(_normalize, same)] for k, same in content.items()}
  except (AttributeError, TypeError, ValueError) as error:
    raise ValueError(
      f"{paths[0]} is not AMBER's ({error}): {SOURCE.describe()}"
    ) from None
  words = {word for name, same in related.items() for word in (name, *same)}
  table = chair.make_synonym_table({word: [word] for word in sorted(words) if word})
  safe = frozenset(map(_normalize, paths[1].read_text().splitlines()))
  return WordTable(table, related, safe)


def _normalize(word: str) -> str:
  return " ".join(chair.split_words(word))


# Scores.


def run(
  items: Sequence[AmberItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Scores the answers by rules; the judge receives nothing.

  Measures of descriptions:
    chair: Share of the mentions that are not in the image.
    cover: Share of the objects in the image that are mentioned.
    hal: Share of the descriptions that make anything up.
    cog: Share of the objects that are likely to be made up which are mentioned.

  Measures of yes-no questions are "accuracy", "odd", and "precision", "recall" and "f1"
  of the answer "no". Each is also computed per kind, as "KIND.accuracy" and so on.
  """
  words = read_words(pathlib.Path(config.questions))
  texts = model.answer([item.question for item in items])
  return [_score(item, text, words) for item, text in zip(items, texts, strict=True)]


def _score(item: AmberItem, text: str | None, words: WordTable) -> ScoredCase:
  if text is None:
    return protocol.make_ratio_case(item.question, None)
  if not isinstance(item.truth, bool):
    tallies = tally_description(item.truth, item.hallu, text, words)
    return protocol.make_ratio_case(item.question, tallies)
  tallies = tally_answer(item.truth, parse_yes_no(text))
  tallies |= {f"{item.kind}.{name}": tally for name, tally in tallies.items()}
  right = "yes" if item.truth else "no"
  return protocol.make_ratio_case(item.question, tallies, right)


def tally_description(
  truth: Sequence[str], hallu: Sequence[str], text: str, words: WordTable
) -> dict[str, tuple[int, int]]:
  """Returns the (numerator, denominator) that a description adds to each measure.

  Args:
    truth: Objects in the image.
    hallu: Objects that are likely to be made up.
    text: The description.
    words: Words with the same meaning.
  """
  mentions = chair.find_mentions(text, words.table)
  present, likely = (_map_words(names, words.related) for names in (truth, hallu))
  counted = [word for word in mentions if word not in words.safe]
  covered = {present[word] for word in counted if word in present}
  wrong = [word for word in counted if word not in present]
  invented = {likely[word] for word in wrong if word in likely}
  return {
    "chair": (len(wrong), len(mentions)),
    "cover": (len(covered), len(truth)),
    "hal": (bool(wrong), 1),
    "cog": (len(invented), len(hallu)),
  }


def _map_words(
  names: Sequence[str], related: Mapping[str, Sequence[str]]
) -> dict[str, str]:
  """Maps each word to the one name that it counts as.

  The first name with a related word has priority, and related words precede names.
  """
  mapping: dict[str, str] = {}
  for name in names:
    for word in related[name]:
      mapping.setdefault(word, name)
  for name in names:
    mapping.setdefault(name, name)
  return mapping


def tally_answer(truth: bool, answer: bool | None) -> dict[str, tuple[int, int]]:
  """Returns the (numerator, denominator) of each measure, with "no" as positive."""
  is_no = answer is False
  is_hit = is_no and not truth
  return {
    "accuracy": (answer is truth, 1),
    "precision": (is_hit, is_no),
    "recall": (is_hit, not truth),
    "f1": (2 * is_hit, is_no + (not truth)),
    "odd": (answer is None, 1),
  }


BENCHMARKS = (
  protocol.Benchmark(
    "amber",
    SOURCE,
    load,
    run,
    scoring="rules",
    shares=SHARES,
    world=world_files.write_amber,
  ),
)
