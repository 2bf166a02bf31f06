"""Scores Object HalBench: objects that a description mentions but the image lacks.

Computes CHAIR (Rohrbach et al. 2018, 1809.02156). As in RLHF-V (2312.00849) and RLAIF-V
(2405.17220), chair_s leaves out responses that mention no object. Those papers extract
the objects with GPT-3.5; here rules find them.

A mention is a word of the synonym table, and the longest match counts: "hot dog" is not
a dog. The last word may be a regular plural, such as buses, knives or women. Other
plurals, such as people, must be in the table. "No dog" mentions a dog.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  ScoredCase,
)
from vlmrlaif_jax.evals.question_files import get_text, load_items

KEYS = ("image_id", "question")
SOURCE = protocol.Source(
  "Object HalBench",
  "https://github.com/RLHF-V/RLAIF-V (eval/data/obj_halbench_300_with_image.jsonl), "
  "https://cocodataset.org (val2014 and its annotations) and "
  "https://github.com/LisaAnne/Hallucination (data/synonyms.txt)",
  """  QUESTIONS.jsonl  a record a line, or .json with a list of them:
                   {"image_id": 42, "question": ...}, and "objects": [...] of what is
                   there, unless annotations are given
  VIDEOS/          a folder; a number n as COCO_val2014_n.jpg with 12 digits, else by
                   "image_id", with or without a suffix
  ANNOTATIONS      COCO's instances_val2014.json and captions_val2014.json; what either
                   names is there
  SYNONYMS.txt     a class a line: dog, puppy, ...""",
)

# Maps the words of a name, singular or plural, to the class.
SynonymTable: TypeAlias = dict[tuple[str, ...], str]
SETTINGS = {
  "synonyms": "",  # File of the synonym table; "" is the embedded world's table.
  "annotations": (),  # COCO's annotation files; () uses "objects" of each record.
}


class ChairItem(NamedTuple):
  """A record of the file."""

  question: BenchmarkQuestion
  objects: frozenset[str]  # Classes in the image.


# Mentions.


def read_synonym_table(path: pathlib.Path | str) -> SynonymTable:
  """Reads the synonym table of a file; "" returns the embedded world's table.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: A word belongs to two classes.
  """
  if not path:
    world_classes = json.loads(world_files.OBJECTS.read_text())
    return make_synonym_table(
      {name: [name, *synonyms] for name, synonyms in world_classes.items()}
    )
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no file of synonyms at {path}: {SOURCE.describe()}")
  lines = path.read_text().splitlines()
  rows = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
  try:
    return make_synonym_table({row[0]: row for row in rows if row})
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def make_synonym_table(classes: Mapping[str, Sequence[str]]) -> SynonymTable:
  """Makes the table from the words of each class, and adds regular plurals.

  A word of a class has priority over a plural with the same spelling.

  Raises:
    ValueError: A word belongs to two classes.
  """
  table: SynonymTable = {}
  for name, words in classes.items():
    for key in map(split_words, words):
      if table.setdefault(key, name) != name:
        raise ValueError(
          f"{' '.join(key)!r} belongs to the classes {table[key]!r} and {name!r}: "
          "remove it from one of them"
        )
  for (*first, last), name in list(table.items()):
    for plural in _list_plurals(last):
      table.setdefault((*first, plural), name)
  return table


def find_mentions(text: str, table: SynonymTable) -> list[str]:
  """Returns the class of each mention in order; the longest match counts."""
  words, classes, start = split_words(text), [], 0
  longest = max(map(len, table), default=0)
  while start < len(words):
    spans = (words[start : start + size] for size in range(longest, 0, -1))
    span = next((span for span in spans if span in table), None)
    if span:
      classes.append(table[span])
    start += len(span) if span else 1
  return classes


def split_words(text: str) -> tuple[str, ...]:
  """Returns the words of a text in lower case."""
  return tuple(re.findall(r"[^\W_]+", text.lower()))


def _list_plurals(word: str) -> list[str]:
  if re.search(r"(s|x|z|ch|sh)$", word):
    return [f"{word}es"]
  if re.search(r"[^aeiou]y$", word):
    return [f"{word[:-1]}ies"]
  if word.endswith("man"):
    return [f"{word[:-3]}men"]
  plurals = [f"{word}s"]
  if word.endswith("o"):
    plurals.append(f"{word}es")
  return plurals + [re.sub("fe?$", "ves", word)] * bool(re.search("fe?$", word))


# Files.


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[ChairItem]:
  """Loads the items of the file; `problems` receives the skipped rows."""
  table = read_synonym_table(config.synonyms)
  annotated = _read_annotations(config.annotations, table)

  def make(number: int, row: dict[str, Any]) -> ChairItem:
    image = row["image_id"]
    if config.annotations:
      objects = annotated.get(image)
    else:
      objects = _map_classes(row["objects"], table) if "objects" in row else None
    if objects is None:
      raise ValueError(
        f'image_id {image!r} has neither "objects" nor a record in '
        f"annotations={config.annotations}"
      )
    text = get_text(row, ("question",))
    question = protocol.make_question(
      config, f"{image}:{number}", _format_file_name(image), text
    )
    return ChairItem(question, frozenset(objects))

  return load_items(config.questions, SOURCE, make, problems, keys=KEYS)


def _format_file_name(image: int | str) -> str:
  return f"COCO_val2014_{image:012d}.jpg" if isinstance(image, int) else image


def _read_annotations(
  paths: Sequence[str], table: SynonymTable
) -> dict[int | str, set[str]]:
  """Returns for each image the classes of COCO's categories and captions."""
  classes: dict[int | str, set[str]] = {}
  for path in map(pathlib.Path, paths):
    if not path.is_file():
      raise FileNotFoundError(f"no annotations at {path}: {SOURCE.describe()}")
    try:
      content = read_json(path)
      names = {each["id"]: each["name"] for each in content.get("categories", ())}
      for row in content["annotations"]:
        if "caption" in row:
          mentions = {*find_mentions(row["caption"], table)}
        else:
          mentions = _map_classes([names[row["category_id"]]], table)
        classes.setdefault(row["image_id"], set()).update(mentions)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
      raise ValueError(
        f"{path} is not COCO's ({error!r}): {SOURCE.describe()}"
      ) from None
  return classes


def _map_classes(names: Sequence[str], table: SynonymTable) -> set[str]:
  for name in names:
    if split_words(name) not in table:
      raise ValueError(
        f"the table of synonyms has no {name!r}: add it to a line, or add a line"
      )
  return {table[split_words(name)] for name in names}


# Scores.


def run(
  items: Sequence[ChairItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Scores the answers by rules; the judge receives nothing.

  Measures:
    chair_s: Share of the responses with mentions that mention a missing object.
    chair_i: Share of the mentions that are of missing objects.
    recall: Share of the objects in the image that are mentioned.
    words: Mean length in words.
  """
  table = read_synonym_table(config.synonyms)
  texts = model.answer([item.question for item in items])
  return [
    protocol.make_ratio_case(
      item.question, None if text is None else _tally(item, text, table)
    )
    for item, text in zip(items, texts, strict=True)
  ]


def _tally(
  item: ChairItem, text: str, table: SynonymTable
) -> dict[str, tuple[int, int]]:
  mentions = find_mentions(text, table)
  wrong = [name for name in mentions if name not in item.objects]
  return {
    "chair_s": (bool(wrong), bool(mentions)),
    "chair_i": (len(wrong), len(mentions)),
    "recall": (len(item.objects.intersection(mentions)), len(item.objects)),
    "words": (len(text.split()), 1),
  }


BENCHMARKS = (
  protocol.Benchmark(
    "chair",
    SOURCE,
    load,
    run,
    settings=SETTINGS,
    scoring="rules",
    files=("questions", "synonyms", "annotations"),
    shares=("chair_s", "chair_i", "recall"),
    world=world_files.write_chair,
  ),
)
