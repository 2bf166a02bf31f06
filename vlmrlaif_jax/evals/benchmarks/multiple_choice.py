"""Scores multiple choice in the layout of Video-MME (Fu et al. 2024, 2405.21075).

An answer is obtained in up to three ways, each with its own measure:
  letter: The most likely letter, with all options in the prompt.
  text: The most likely option text, without options in the prompt.
  generation: The letter that the generated answer states.

No judge is needed. An answer that states no option, or several, counts as unparsed.
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
# Prompts of the policy; there is no judge.
PROMPTS = {"letter": _READ, "text": "{question}", "generation": _READ}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUBSETS = {"durations": "duration", "domains": "domain", "tasks": "task_type"}
SETTINGS = {
  "by": ("letter", "generation"),  # Names of PROMPTS.
  "durations": (),  # Durations to select, such as ("short",); () selects all.
  "domains": (),  # Domains to select; () selects all.
  "tasks": (),  # Values of "task_type" to select; () selects all.
}


class ChoiceItem(NamedTuple):
  """A record of the file."""

  id: str
  video: str
  duration: str
  question: str
  options: tuple[str, ...]  # Texts of the options without letters.
  answer: int  # Index of the right option.


def check(config: ConfigDict) -> None:
  """Raises ValueError if `by` is empty or contains an unknown way."""
  if not config.by or not set(config.by) <= set(PROMPTS):
    raise ValueError(f"by must be some of {tuple(PROMPTS)}, got {config.by!r}")


def load(config: ConfigDict) -> list[ChoiceItem]:
  """Loads the items of the selected durations, domains and tasks."""
  path = pathlib.Path(config.questions)
  rows = protocol.read_records_list(path, KEYS, SOURCE, once=("question_id",))
  items = []
  for row in rows:
    item = _make_item(path, row, config.videos)
    if all(
      not config[name] or row.get(k) in config[name] for name, k in SUBSETS.items()
    ):
      items.append(item)
  if not items:
    selected = {name: tuple(config[name]) for name in SUBSETS if config[name]}
    available = {k: sorted({str(row.get(k)) for row in rows}) for k in SUBSETS.values()}
    raise ValueError(f"{path} has no question of {selected}; it has {available}")
  return items


def _make_item(path, row, videos) -> ChoiceItem:
  id, options, answer = str(row["question_id"]), row["options"], row["answer"]
  letters, form = LETTERS[: len(options)], r"\(?([A-Z])[.):]\s*(.+)"
  matches = [re.fullmatch(form, str(option), re.DOTALL) for option in options]
  if len(options) < 2 or [match and match[1] for match in matches] != [*letters]:
    raise ValueError(
      f'{path}, question_id {id}: options must be ["A. ...", "B. ...", ...], two or '
      f"more, got {options!r}: {SOURCE.describe()}"
    )
  if answer not in [*letters]:
    raise ValueError(
      f"{path}, question_id {id}: answer must be one of {letters}, got {answer!r}"
    )
  return ChoiceItem(
    id,
    protocol.find_video(videos, row["videoID"]),
    str(row["duration"]),
    str(row["question"]),
    tuple(match[2].strip() for match in matches if match),
    letters.index(answer),
  )


def run(
  items: Sequence[ChoiceItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns whether each choice is right, for each way and also per duration."""
  rows = []
  for by in config.by:
    questions = [make_choice_question(item, by) for item in items]
    if by == "generation":
      texts = model.answer(questions)
      choices = [_parse_answer(i, t) for i, t in zip(items, texts, strict=True)]
    elif model.choose is None:
      raise ValueError(
        f"by={by!r} requires log-probabilities: set the model's `choose`"
      )
    else:
      logps = model.choose(f"by_{by}", questions)
      choices = ["unanswered" if x is None else int(np.argmax(x)) for x in logps]
    rows += [_score(by, i, choice) for i, choice in zip(items, choices, strict=True)]
  return rows


def make_choice_question(item: ChoiceItem, by: str) -> BenchmarkQuestion:
  """Returns the question that a model receives, with the options it chooses from."""
  listed = "\n".join(f"{x}. {t}" for x, t in zip(LETTERS, item.options, strict=False))
  text = PROMPTS[by].format(question=item.question, options=listed)
  letters = tuple(LETTERS[: len(item.options)])
  options = item.options if by == "text" else letters
  return BenchmarkQuestion(item.id, item.video, text, options)


def _parse_answer(item: ChoiceItem, text: str | None) -> int | str:
  """Returns the index of the stated option, or the fault."""
  if text is None:
    return "unanswered"
  index = parse_choice(text, item.options)
  return "unparsed" if index is None else index


def _score(by: str, item: ChoiceItem, choice: int | str) -> ScoredCase:
  """Returns the scored case of a choice, or of a fault."""
  case = ScoredCase(f"{by}:{item.id}", item.video, {}, right=LETTERS[item.answer])
  if isinstance(choice, str):
    return case._replace(fault=choice)
  names = (f"{by}_accuracy", f"{by}_accuracy_{item.duration}")
  return case._replace(values=dict.fromkeys(names, float(choice == item.answer)))


# Forms of answers: "C", "(c)", "C. A dog.", "The answer is (C).", "A dog."

_BEFORE = r"[\s(\[\"']*"
# A letter by itself, as in "A or B". "A man", "I think", "D.C." and "B-roll" have none.
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
  """Returns the index of the one option that a text states; None for none or several.

  The rules apply in this order: a letter at the start, or one that the text calls the
  answer; the text of an option, word by word; the only letter that stands by itself.

  Args:
    text: The generated answer.
    options: Texts of the options.
  """
  plain = text.replace("*", "").replace("`", "").strip()
  bare, first = _BARE.fullmatch(plain), _FIRST.match(plain)
  letters = {bare[1].upper()} if bare else {*_STATED.findall(plain)}
  if first:
    letters.add(first[1])
  if not letters:
    words = _split(_LEAD.sub("", plain))
    letters = {x for x, t in zip(LETTERS, options, strict=False) if _split(t) == words}
  letters = letters or {*_ANY.findall(plain)}
  index = LETTERS.index(next(iter(letters))) if len(letters) == 1 else len(options)
  return index if index < len(options) else None


def _split(text: str) -> list[str]:
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
