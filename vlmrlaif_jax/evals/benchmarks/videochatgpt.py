"""Scores Video-ChatGPT's generative benchmark (Maaz et al. 2023, 2306.05424, 4.2).

A judge reads the right answer and rates five qualities of the policy's answer from 0 to
5. Consistency compares the answers to two questions with one right answer. The judge
reads both questions, as in Video-ChatGPT's script. VLM-RLAIF's script sends the first
question twice.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  JudgeCase,
  ScoredCase,
)
from vlmrlaif_jax.evals.judging import judge_cases
from vlmrlaif_jax.evals.question_files import get_text, load_items
from vlmrlaif_jax.feedback.replies.scores import parse_score

KEYS = {
  "generic": ("video_name", "Q", "A"),
  "temporal": ("video_name", "Q", "A"),
  "consistency": ("video_name", "Q1", "Q2", "A"),
}
SOURCE = protocol.Source(
  "Video-ChatGPT's benchmark",
  "https://github.com/mbzuai-oryx/Video-ChatGPT (quantitative_evaluation)",
  """  QUESTIONS/                a folder
    generic_qa.json         [{"video_name": ..., "Q": ..., "A": ...}, ...]
    temporal_qa.json        the same
    consistency_qa.json     [{"video_name": ..., "Q1": ..., "Q2": ..., "A": ...}, ...]
  VIDEOS/                   the test videos of ActivityNet-200
    v_p1QGn0IzfW0.mp4       by "video_name", with a suffix""",
)
ONE_ANSWER = "Question: {q0}\nCorrect answer: {answer}\nPredicted answer: {said0}"
TWO_ANSWERS = (
  "Question 1: {q0}\nQuestion 2: {q1}\nCorrect answer: {answer}\n"
  "Predicted answer to question 1: {said0}\nPredicted answer to question 2: {said1}"
)
PARAPHRASE = "Other words for the same thing are as good."


def _get_file(name: str) -> str:
  """Returns the file with the questions of a quality."""
  return name if name in KEYS else "generic"


def _make_prompt(fields: str, quality: str, *criteria: str) -> str:
  points = "\n".join(f"- {point}" for point in criteria)
  return (
    f"You rate answers to questions about videos by one quality: {quality}. "
    f"Compare what was predicted with the correct answer.\n{points}\n{fields}\n"
    "Give a whole number from 0 to 5, where 5 is best. Reply with a Python dictionary "
    'and nothing else, such as {{"score": 3}}.'
  )


PROMPTS = {  # The judge's prompt for each quality.
  "correctness": _make_prompt(
    ONE_ANSWER,
    "factual correctness",
    "What it states must be true of the video, and must not mislead.",
    "It must agree with the correct answer.",
    PARAPHRASE,
  ),
  "detail": _make_prompt(
    ONE_ANSWER,
    "level of detail",
    "Complete: it covers every main point of the correct answer.",
    "Specific: it names particulars of the video, and not generalities.",
    PARAPHRASE,
  ),
  "context": _make_prompt(
    ONE_ANSWER,
    "understanding of the context",
    "It must fit what the video as a whole is about.",
    "It must catch the main themes, and say nothing that is out of place.",
    PARAPHRASE,
  ),
  "temporal": _make_prompt(
    ONE_ANSWER,
    "understanding of time",
    "Events must come in the order in which the video shows them.",
    "It must agree with the correct answer about what comes when.",
    "Other words for the same thing are as good, if the order is kept.",
  ),
  "consistency": _make_prompt(
    TWO_ANSWERS,
    "consistency between two answers",
    "Both questions ask for the same thing: the answers must agree with each other.",
    "Both must agree with the correct answer.",
    PARAPHRASE,
  ),
}


class VideoChatGptItem(NamedTuple):
  """A record of one of the files."""

  file: str  # Name in KEYS.
  id: str
  questions: tuple[BenchmarkQuestion, ...]  # One question, or two for consistency.
  answer: str


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[VideoChatGptItem]:
  """Loads the items of the three files; `problems` receives the skipped rows."""
  items: list[VideoChatGptItem] = []
  for file, keys in KEYS.items():
    path = pathlib.Path(config.questions) / f"{file}_qa.json"
    make = functools.partial(_make_item, config, file)
    items += load_items(path, SOURCE, make, problems, keys=keys)
  return items


def _make_item(
  config: ConfigDict, file: str, number: int, row: dict[str, Any]
) -> VideoChatGptItem:
  name = get_text(row, ("video_name",))
  id = f"{file}:{name}:{number - 1}"
  questions = tuple(
    protocol.make_question(config, f"{id}:{i}", name, get_text(row, (key,)))
    for i, key in enumerate(KEYS[file][1:-1])
  )
  return VideoChatGptItem(file, id, questions, get_text(row, ("A",)))


def run(
  items: Sequence[VideoChatGptItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns the scores of each quality, from 0 to 5."""
  questions = [question for item in items for question in item.questions]
  texts = model.answer(questions)
  answers = {q.id: text for q, text in zip(questions, texts, strict=True)}
  rows = []
  for name in PROMPTS:
    rated = [item for item in items if item.file == _get_file(name)]
    cases = [_make_case(name, item, answers) for item in rated]
    rows += judge_cases(cases, judge, functools.partial(_parse_reply, name))
  return rows


def _make_case(
  name: str, item: VideoChatGptItem, answers: Mapping[str, str | None]
) -> JudgeCase:
  texts = tuple(answers[question.id] for question in item.questions)
  fields: dict[str, str | None] = {"answer": item.answer}
  for i, (question, text) in enumerate(zip(item.questions, texts, strict=True)):
    fields |= {f"q{i}": question.text, f"said{i}": text}
  prompt = PROMPTS[name].format(**fields)
  video = item.questions[0].video
  return JudgeCase(f"{name}:{item.id}", video, prompt, item.answer, texts)


def _parse_reply(name: str, text: str) -> dict[str, float] | None:
  score = parse_score(text, high=5)
  return None if score is None else {name: score}


BENCHMARKS = (
  protocol.Benchmark(
    "videochatgpt",
    SOURCE,
    load,
    run,
    prompts=PROMPTS,
    world=world_files.write_videochatgpt,
  ),
)
