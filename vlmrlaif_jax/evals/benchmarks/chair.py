"""Object HalBench: objects that a description mentions, and that are not there.

CHAIR (Rohrbach et al. 2018, 1809.02156), with responses that mention no object left
out of chair_s, as RLHF-V (2312.00849) and RLAIF-V (2405.17220) have it. Objects are
found by rules and not, as in those, by GPT-3.5: words of the synonym table, the longest
first ("hot dog" is no dog). The last word may be a regular plural (buses, knives,
women); others, such as people, must stand in the table. "No dog" mentions a dog.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  ScoredCase,
)

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

SynonymTable: TypeAlias = dict[
  tuple[str, ...], str
]  # Words, in either number -> class.
SETTINGS = {
  "synonyms": "",  # The table of classes; "": of the embedded world.
  "annotations": (),  # COCO's files of what is there; (): "objects" of each record.
}


class ChairItem(NamedTuple):
  """A record of the file."""

  question: BenchmarkQuestion
  objects: frozenset[str]  # Classes that are there.


# Mentions.


def read_synonym_table(path: pathlib.Path | str) -> SynonymTable:
  """The table of a file; "" is that of the embedded world.

  Raises:
    FileNotFoundError, ValueError: it is not there, or a word is of two classes.
  """
  if not path:
    own = json.loads(world_files.OBJECTS.read_text())
    return make_synonym_table({name: [name, *others] for name, others in own.items()})
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
  """The table of classes and the words for each; a word as it stands goes before a
  plural that is made of another.

  Raises:
    ValueError: a word is of two classes.
  """
  table: SynonymTable = {}
  for name, words in classes.items():
    for said in map(split_words, words):
      if table.setdefault(said, name) != name:
        raise ValueError(
          f"{' '.join(said)!r} is of the classes {table[said]!r} and {name!r}: take it "
          "from one"
        )
  for (*first, last), name in list(table.items()):
    for plural in _plurals(last):
      table.setdefault((*first, plural), name)
  return table


def find_mentions(text: str, table: SynonymTable) -> list[str]:
  """The class of each mention, in order; a word is of one mention, the longest."""
  said, found, at = split_words(text), [], 0
  longest = max(map(len, table), default=0)
  while at < len(said):
    spans = (said[at : at + size] for size in range(longest, 0, -1))
    span = next((span for span in spans if span in table), None)
    if span:
      found.append(table[span])
    at += len(span) if span else 1
  return found


def split_words(text: str) -> tuple[str, ...]:
  """The words of a text, in small letters."""
  return tuple(re.findall(r"[^\W_]+", text.lower()))


def _plurals(word: str) -> list[str]:
  if re.search(r"(s|x|z|ch|sh)$", word):
    return [f"{word}es"]
  if re.search(r"[^aeiou]y$", word):
    return [f"{word[:-1]}ies"]
  if word.endswith("man"):
    return [f"{word[:-3]}men"]
  made = [f"{word}s"]
  if word.endswith("o"):
    made.append(f"{word}es")
  return made + [re.sub("fe?$", "ves", word)] * bool(re.search("fe?$", word))


# The files.


def load(config: ConfigDict) -> list[ChairItem]:
  """The items of the file."""
  path, table = pathlib.Path(config.questions), read_synonym_table(config.synonyms)
  there = _annotated(config.annotations, table)
  items = []
  for number, row in enumerate(protocol.read_records_list(path, KEYS, SOURCE), 1):
    image = row["image_id"]
    if config.annotations:
      objects = there.get(image)
    else:
      objects = _classes(row["objects"], table) if "objects" in row else None
    if objects is None:
      raise ValueError(
        f"{path}, record {number}: what image_id {image!r} shows stands neither in its "
        f"objects nor in annotations={config.annotations}: {SOURCE.describe()}"
      )
    asked = protocol.make_question(
      config, f"{image}:{number}", _file(image), row["question"]
    )
    items.append(ChairItem(asked, frozenset(objects)))
  return items


def _file(image: int | str) -> str:
  return f"COCO_val2014_{image:012d}.jpg" if isinstance(image, int) else image


def _annotated(paths: Sequence[str], table: SynonymTable) -> dict[int | str, set[str]]:
  """By image, the classes that COCO's files name, by category or in a caption."""
  there: dict[int | str, set[str]] = {}
  for path in map(pathlib.Path, paths):
    if not path.is_file():
      raise FileNotFoundError(f"no annotations at {path}: {SOURCE.describe()}")
    try:
      told = json.loads(path.read_bytes())
      names = {each["id"]: each["name"] for each in told.get("categories", ())}
      for row in told["annotations"]:
        captioned = "caption" in row
        found = (
          find_mentions(row["caption"], table)
          if captioned
          else _classes([names[row["category_id"]]], table)
        )
        there.setdefault(row["image_id"], set()).update(found)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
      raise ValueError(f"{path} is not COCO's ({error!r}): {SOURCE.describe()}") from None
  return there


def _classes(names: Sequence[str], table: SynonymTable) -> set[str]:
  for name in names:
    if split_words(name) not in table:
      raise ValueError(
        f"the table of synonyms has no {name!r}: add it, or a line of it"
      )
  return {table[split_words(name)] for name in names}


# Scores.


def run(
  items: Sequence[ChairItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns measures by rules; the judge is not asked.

  chair_s: responses that mention what is not there, of those that mention an object;
  chair_i: mentions of what is not there, of all mentions;
  recall: objects there that are mentioned, of all that are there;
  words: mean length.
  """
  table = read_synonym_table(config.synonyms)
  texts = model.answer([item.question for item in items])
  return [
    protocol.make_ratio_case(
      item.question, None if text is None else _tallies(item, text, table)
    )
    for item, text in zip(items, texts, strict=True)
  ]


def _tallies(
  item: ChairItem, text: str, table: SynonymTable
) -> dict[str, tuple[int, int]]:
  said = find_mentions(text, table)
  wrong = [name for name in said if name not in item.objects]
  return {
    "chair_s": (bool(wrong), bool(said)),
    "chair_i": (len(wrong), len(said)),
    "recall": (len(item.objects.intersection(said)), len(item.objects)),
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
