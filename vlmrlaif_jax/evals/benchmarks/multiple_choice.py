"""Multiple choice as Video-MME has it (Fu et al. 2024, 2405.21075).

An answer is taken in up to three ways, each a measure of its own:
  letter      the likeliest of the options' letters, all options being read
  text        the likeliest of the options' texts, none being read
  generation  the letter that the policy's own words name

There is no judge. Words that name no option, or several, are counted as unparsed.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  ScoredCase,
)

KEYS = ("videoID", "question_id", "duration", "question", "options", "answer")
SOURCE = protocol.Source(
  "Video-MME",
  "https://github.com/MME-Benchmarks/Video-MME, its table "
  "https://huggingface.co/datasets/lmms-lab/Video-MME written as JSON",
  """  QUESTIONS.json   [{"videoID": ..., "question_id": "001-1", "duration": "short",
                     "domain": ..., "task_type": ..., "question": ...,
                     "options": ["A. ...", "B. ...", ...], "answer": "B"}, ...]
                   or .jsonl, a record a line
  VIDEOS/          a folder
    NAME.mp4       by "videoID", with a suffix""",
)
_READ = (
  "{question}\n{options}\nAnswer with the letter of the right option and nothing else."
)
# What a policy is told; no judge is.
PROMPTS = {"letter": _READ, "text": "{question}", "generation": _READ}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUBSETS = {"durations": "duration", "domains": "domain", "tasks": "task_type"}
SETTINGS = {
  "by": ("letter", "generation"),  # Of PROMPTS.
  "durations": (),  # Only these, such as ("short",); () for all.
  "domains": (),
  "tasks": (),  # By "task_type".
}


class ChoiceItem(NamedTuple):
  """A record of the file."""

  id: str
  video: str
  duration: str
  question: str
  options: tuple[str, ...]  # Without their letters.
  answer: int  # The place of the right option.


def check(config: ConfigDict) -> None:
  """Raises ValueError for a way of answering that there is not, or for none."""
  if not config.by or not set(config.by) <= set(PROMPTS):
    raise ValueError(f"by must be some of {tuple(PROMPTS)}, not {config.by!r}")


def load(config: ConfigDict) -> list[ChoiceItem]:
  """The items of the file that are of the subsets."""
  path = pathlib.Path(config.questions)
  rows = protocol.read_records_list(path, KEYS, SOURCE, once=("question_id",))
  items = []
  for row in rows:
    item = _item(path, row, config.videos)
    if all(
      not config[name] or row.get(k) in config[name] for name, k in SUBSETS.items()
    ):
      items.append(item)
  if not items:
    wanted = {name: tuple(config[name]) for name in SUBSETS if config[name]}
    there = {k: sorted({str(row.get(k)) for row in rows}) for k in SUBSETS.values()}
    raise ValueError(f"{path} has no question of {wanted}; there are {there}")
  return items


def _item(path, row, videos) -> ChoiceItem:
  id, given, answer = str(row["question_id"]), row["options"], row["answer"]
  letters = LETTERS[: len(given)]
  found = [re.fullmatch(r"\(?([A-Z])[.):]\s*(.+)", str(o), re.DOTALL) for o in given]
  if len(given) < 2 or [m and m[1] for m in found] != [*letters]:
    raise ValueError(
      f'{path}, question_id {id}: options must be ["A. ...", "B. ...", ...], two or '
      f"more, not {given!r}: {SOURCE.describe()}"
    )
  if answer not in [*letters]:
    raise ValueError(
      f"{path}, question_id {id}: answer must be of {letters}, not {answer!r}"
    )
  options = tuple(match[2].strip() for match in found if match)
  video = protocol.find_video(videos, row["videoID"])
  asked = str(row["question"])
  return ChoiceItem(
    id, video, str(row["duration"]), asked, options, letters.index(answer)
  )


def run(
  items: Sequence[ChoiceItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns whether each choice of each way is right, also by duration."""
  rows = []
  for by in config.by:
    questions = [make_choice_question(item, by) for item in items]
    if by == "generation":
      texts = model.answer(questions)
      said = [_parsed(i, t) for i, t in zip(items, texts, strict=True)]
    elif model.choose is None:
      raise ValueError(f"by={by!r} chooses by log-probability: give the model `choose`")
    else:
      found = model.choose(f"by_{by}", questions)
      said = ["unanswered" if x is None else int(np.argmax(x)) for x in found]
    rows += [_scored(by, i, s) for i, s in zip(items, said, strict=True)]
  return rows


def make_choice_question(item: ChoiceItem, by: str) -> BenchmarkQuestion:
  """What a model is asked, and what it may choose from."""
  listed = "\n".join(f"{x}. {t}" for x, t in zip(LETTERS, item.options, strict=False))
  text = PROMPTS[by].format(question=item.question, options=listed)
  letters = tuple(LETTERS[: len(item.options)])
  options = item.options if by == "text" else letters
  return BenchmarkQuestion(item.id, item.video, text, options)


def _parsed(item: ChoiceItem, text: str | None) -> int | str:
  """The place of the option that is named, or why there is none."""
  if text is None:
    return "unanswered"
  place = parse_choice(text, item.options)
  return "unparsed" if place is None else place


def _scored(by: str, item: ChoiceItem, said: int | str) -> ScoredCase:
  """What becomes of a choice, or of a fault."""
  found = ScoredCase(f"{by}:{item.id}", item.video, {}, right=LETTERS[item.answer])
  if isinstance(said, str):
    return found._replace(fault=said)
  names = (f"{by}_accuracy", f"{by}_accuracy_{item.duration}")
  return found._replace(values=dict.fromkeys(names, float(said == item.answer)))


# What policies say: "C", "(c)", "C. A dog.", "The answer is (C).", "A dog."

_BEFORE = r"[\s(\[\"']*"
# No letters of options: "A man" and "I think", but for "A or B"; "D.C.", "B-roll".
_ALONE = (
  r"(?<![\w.'’-])(?:[B-HJ-Z]|[AI](?!\s+(?!(?:or|and|is)\b)[a-z]))(?![\w'’-]|\.\w)"
)
_DENIED = r"(?<![Nn]ot )(?<![Nn]or )(?<!either )"
_BARE = re.compile(r"\W*([A-Za-z])\W*")
_FIRST = re.compile(rf"{_BEFORE}([A-Z])(?:\s*$|\s*\n|[.):\]](?!\w))")
_STATED = re.compile(rf"(?i:answer\s*(?:is\s*:?|:|=)(?:\s*option)?){_BEFORE}({_ALONE})")
_ANY = re.compile(rf"{_DENIED}{_ALONE}")
_LEAD = re.compile(r".*\banswer\s*(?:is\s*:?|:|=)", re.IGNORECASE | re.DOTALL)


def parse_choice(text: str, options: Sequence[str]) -> int | None:
  """The place of the one option that a text names; None for none or several.

  In this order: a letter that it begins with or calls the answer; an option's text,
  word by word; the one letter that stands somewhere by itself.
  """
  plain = text.replace("*", "").replace("`", "").strip()
  bare, first = _BARE.fullmatch(plain), _FIRST.match(plain)
  named = {bare[1].upper()} if bare else {*_STATED.findall(plain)}
  if first:
    named.add(first[1])
  if not named:
    said = _words(_LEAD.sub("", plain))
    named = {x for x, t in zip(LETTERS, options, strict=False) if _words(t) == said}
  named = named or {*_ANY.findall(plain)}
  place = LETTERS.index(next(iter(named))) if len(named) == 1 else len(options)
  return place if place < len(options) else None


def _words(text: str) -> list[str]:
  return re.findall(r"\w+", text.lower())


_CHOICE = protocol.Benchmark(
  "multiple_choice",
  SOURCE,
  load,
  run,
  settings=SETTINGS,
  scoring="rules",
  prompts=PROMPTS,
  world=world_files.write_multiple_choice,
  check=check,
)
BENCHMARKS = (_CHOICE, _CHOICE._replace(name="videomme", world=None))
