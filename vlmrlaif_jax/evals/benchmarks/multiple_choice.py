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
from vlmrlaif_jax.feedback.replies.options import LETTERS, parse_choice

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
