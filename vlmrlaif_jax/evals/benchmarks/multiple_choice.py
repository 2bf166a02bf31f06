"""Scores multiple choice in the layout of Video-MME (Fu et al. 2024, 2405.21075).

An answer is obtained in up to three ways, each with its own measure:
  letter: The most likely letter, with all options in the prompt.
  text: The most likely option text, without options in the prompt.
  generation: The letter that the generated answer states.

No judge is needed. An answer that states no option, or several, counts as unparsed.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.data.formats.video_files import find_video
from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  ScoredCase,
)
from vlmrlaif_jax.evals.choice_rows import add_row_range, read_choice
from vlmrlaif_jax.evals.question_files import (
  QUESTION_ID_KEYS,
  TABLE_SUFFIXES,
  get_text,
  get_video_names,
  load_items,
  read_answers,
)
from vlmrlaif_jax.feedback.replies.options import LETTERS, parse_choice

SOURCE = protocol.Source(
  "Video-MME",
  "https://github.com/MME-Benchmarks/Video-MME, or its table "
  "https://huggingface.co/datasets/lmms-lab/Video-MME",
  """  QUESTIONS        .json, .jsonl, .csv, .tsv, .parquet, or a folder of such files:
                   [{"videoID": ..., "question_id": "001-1", "duration": "short",
                     "domain": ..., "task_type": ..., "question": ...,
                     "options": ["A. ...", "B. ...", ...], "answer": "B"}, ...]
                   Also the fields of MVBench, NExT-QA, EgoSchema, Perception Test,
                   TempCompass, LongVideoBench and MLVU; see docs/stages/evaluation.md
  VIDEOS/          a folder
    NAME.mp4       by "videoID", with any suffix""",
)
_READ = (
  "{question}\n{options}\nAnswer with the letter of the right option and nothing else."
)
# Prompts of the policy; there is no judge.
PROMPTS = {"letter": _READ, "text": "{question}", "generation": _READ}
SUBSETS = {  # Fields of a row by the setting that selects some of their values.
  "durations": ("duration_group", "duration"),
  "domains": ("domain", "topic_category", "area"),
  "tasks": ("task_type", "question_type", "question_category", "dim", "type"),
}
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
  duration: str  # Name such as "short", "" for none.
  question: str
  options: tuple[str, ...]  # Texts of the options without letters.
  answer: int  # Index of the right option.


def check(config: ConfigDict) -> None:
  """Raises ValueError if `by` is empty or contains an unknown way."""
  if not config.by or not set(config.by) <= set(PROMPTS):
    raise ValueError(f"by must be some of {tuple(PROMPTS)}, got {config.by!r}")


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[ChoiceItem]:
  """Loads the items of the selected durations, domains and tasks.

  `problems` receives the skipped rows.
  """
  path = pathlib.Path(config.questions)
  items: list[tuple[ChoiceItem, dict[str, str]]] = []
  for file in _list_files(path):
    make = _make_item_fn(file, config.videos)
    items += load_items(file, SOURCE, make, problems)
  available: dict[str, set[str]] = {name: set() for name in SUBSETS}
  for _, groups in items:
    for name, value in groups.items():
      available[name].add(value)
  selected = [
    item
    for item, groups in items
    if all(not config[name] or groups[name] in config[name] for name in SUBSETS)
  ]
  if not selected:
    names = {name: tuple(config[name]) for name in SUBSETS if config[name]}
    known = {name: sorted(values) for name, values in available.items()}
    raise ValueError(f"{path} has no question of {names}; it has {known}")
  return selected


def _list_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a folder, which MVBench has one of for each task."""
  if not path.is_dir():
    return [path]
  files = [file for file in sorted(path.iterdir()) if file.suffix in TABLE_SUFFIXES]
  if not files:
    raise ValueError(
      f"{path} has no file of {' '.join(TABLE_SUFFIXES)}: {SOURCE.describe()}"
    )
  return files


def _make_item_fn(
  file: pathlib.Path, videos: str
) -> Callable[[int, dict[str, Any]], tuple[ChoiceItem, dict[str, str]]]:
  """Returns the function that makes an item of a row, with its duration and so on."""
  answers = read_answers(file)
  video_by_id: dict[str, str] = {}

  def make(number: int, row: dict[str, Any]) -> tuple[ChoiceItem, dict[str, str]]:
    names = get_video_names(row)
    id = (
      get_text(row, QUESTION_ID_KEYS)
      if any(k in row for k in QUESTION_ID_KEYS)
      else str(number)
    )
    choice = read_choice(row, answers.get(id))
    video = add_row_range(find_video(videos, *names), row)
    if id in video_by_id:  # NExT-QA numbers the questions of each video.
      if video_by_id[id] == names[0]:
        raise ValueError(f"question_id {id} is there twice")
      id = f"{names[0]}:{id}"
    if id in video_by_id:
      raise ValueError(f"question_id {id} is there twice")
    video_by_id[id] = names[0]
    groups = {
      name: get_text(row, keys) if any(k in row for k in keys) else ""
      for name, keys in SUBSETS.items()
    }
    groups["tasks"] = groups["tasks"] or file.stem
    # Of MLVU and LongVideoBench, the duration is a number of seconds.
    duration = "" if _is_number(groups["durations"]) else groups["durations"]
    item = ChoiceItem(id, video, duration, *choice)
    return item, {**groups, "durations": duration}

  return make


def _is_number(text: str) -> bool:
  return text.replace(".", "", 1).isdecimal()


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
  names = [f"{by}_accuracy"]
  if item.duration:
    names.append(f"{by}_accuracy_{item.duration}")
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
