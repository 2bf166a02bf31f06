"""Writes the embedded world's held-out questions in the layouts of the benchmarks.

Every right answer is known exactly, so the right value of every measure is known too.
"""

import collections
import itertools
import json
import os
import pathlib
import string
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data.prompts import BRIEF_PROMPTS
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.video import format_video_name
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.evals.benchmarks.protocol import CaseJudge, JudgeCase
from vlmrlaif_jax.evals.world_truth import DESCRIPTION

Examples: TypeAlias = Sequence[Example]

TEMPORAL = ("motion", "event", "order")  # Kinds of questions about time.
# Replies of the exact judge to right answers and to wrong ones.
BEST = '{"pred": "yes", "score": 5, "rating": 6}'
WORST = '{"pred": "no", "score": 0, "rating": 0}'
# Two questions with one right answer, which is a description.
TWICE = (language.DESCRIBE_EVENTS, BRIEF_PROMPTS.caption)
MAX_OPTIONS = 4  # Maximum number of options of a multiple choice.
# Names of each class of objects.
OBJECTS = pathlib.Path(__file__).parents[2] / "assets" / "world_objects.json"
MAX_TRIES = 10_000  # Maximum number of samples until a record's question recurs.


def check_world_examples(examples: Sequence[Example]) -> None:
  """Checks that examples are of the embedded world.

  Raises:
    UserError: An example has no scene.
  """
  if not all("scene" in (e.get("truth") or {}) for e in examples):
    raise UserError(
      "a benchmark's files can be written for the embedded world only: set "
      "--config.evaluate.NAME.questions and --config.evaluate.NAME.videos to your files"
    )


# Each function `write_NAME` writes the files of a benchmark from examples with truth.
# It returns the value of the setting `questions`. Names of videos are relative to
# `videos`.


def _is_description(example: Example) -> bool:
  return example["truth"]["kind"] == DESCRIPTION


def _make_writer(
  name: str, make_row: Callable[[Example, str], dict[str, Any]], *, descriptions: bool
) -> Callable[[pathlib.Path, Examples, str], pathlib.Path]:
  """Returns a function that writes a row per description, or per short question."""

  def write(folder: pathlib.Path, examples: Examples, videos: str) -> pathlib.Path:
    chosen = [e for e in examples if _is_description(e) == descriptions]
    rows = [make_row(example, _get_name(example, videos)) for example in chosen]
    return _write(folder / f"{name}.json", rows)

  return write


def write_videochatgpt(
  folder: pathlib.Path, examples: Examples, videos: str
) -> pathlib.Path:
  """Writes the three files of Video-ChatGPT's benchmark."""
  names = ("generic_qa", "temporal_qa", "consistency_qa")
  files: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
  for example in examples:
    name, truth = _get_name(example, videos), example["truth"]
    fields = {"video_name": name, "Q": example["question"], "A": truth["answer"]}
    files["temporal_qa" if truth["kind"] in TEMPORAL else "generic_qa"].append(fields)
    if _is_description(example):
      both = dict(zip(("Q1", "Q2"), TWICE, strict=True))
      row = {"video_name": name, **both, "A": truth["answer"]}
      files["consistency_qa"].append(row)
  for name, rows in files.items():
    _write(folder / "videochatgpt" / f"{name}.json", rows)
  return folder / "videochatgpt"


def write_retrieval(
  folder: pathlib.Path, examples: Examples, videos: str
) -> pathlib.Path:
  """Writes a caption for each video."""
  rows = [
    {"video_id": name, "caption": language.describe_scene(content)}
    for name, content in _load_scenes(examples, videos).items()
  ]
  return _write(folder / "retrieval.json", {"sentences": rows})


def write_action(folder: pathlib.Path, examples: Examples, videos: str) -> pathlib.Path:
  """Writes the test split; an action is named by the first motions in its videos.

  An example is "moves_left_and_stays_still".
  """
  lines: dict[str, str] = collections.defaultdict(str)
  for name, content in _load_scenes(examples, videos).items():
    motions = {item.motion for item in content.objects}
    moves = [x for x in language.MOVES if x.split()[-1] in motions]
    lines["_and_".join(moves).replace(" ", "_")] += f"{name} 2\n"
  for action, text in lines.items():
    _write(folder / "action" / f"{action}_test_split1.txt", text)
  return folder / "action"


def write_amber(folder: pathlib.Path, examples: Examples, videos: str) -> pathlib.Path:
  """Writes the annotations, the queries and the tables of words."""
  notes: list[dict[str, Any]] = []
  queries: list[dict[str, Any]] = []
  for example in filter(_is_description, examples):
    for question, *truth in _make_amber_rows(example):
      key: dict[str, Any] = {"id": len(notes) + 1}
      queries.append(key | {"image": _get_name(example, videos), "query": question})
      facts = zip(("type", "truth", "hallu"), truth, strict=False)
      notes.append(key | dict(facts))
  _write(folder / "amber" / "annotations.json", notes)
  _write(folder / "amber" / "query" / "query_all.json", queries)
  _write(folder / "amber" / "relation.json", OBJECTS.read_text())
  _write(folder / "amber" / "safe_words.txt", "")
  return folder / "amber"


def _write(path: pathlib.Path, content: Any) -> pathlib.Path:
  """Writes a string as text and any other content as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    content if isinstance(content, str) else json.dumps(content, indent=1)
  )
  return path


def _get_name(example: Example, videos: str | os.PathLike) -> str:
  """Returns a video's path relative to the folder of videos, without suffix."""
  return os.path.splitext(
    os.path.relpath(format_video_name(example["video"]), os.fspath(videos))
  )[0]


def _load_scenes(
  examples: Sequence[Example], videos: str | os.PathLike
) -> dict[str, scene.Scene]:
  """Returns the scene of each video by its name."""
  return {
    _get_name(e, videos): scene.scene_from_json(e["truth"]["scene"]) for e in examples
  }


def _make_qa_row(example: Example, name: str) -> dict[str, Any]:
  question = {"question_id": example["id"], "question": example["question"]}
  return {"video_name": name, **question, "answer": example["truth"]["answer"]}


def _make_choice_row(example: Example, name: str) -> dict[str, Any]:
  """Returns a row with the right answer and wrong ones, in random order."""
  truth = example["truth"]
  rng = np.random.default_rng(zlib.crc32(str(example["id"]).encode()))
  wrong = [str(x) for x in rng.permutation(_list_wrong_answers(example, rng))][
    : MAX_OPTIONS - 1
  ]
  options = [str(x) for x in rng.permutation([truth["answer"], *wrong])]
  letters = string.ascii_uppercase[: len(options)]
  return {
    "videoID": name,
    "question_id": example["id"],
    "question": example["question"],
    "duration": "short",
    "domain": "embedded world",
    "task_type": truth["kind"],
    "options": [f"{x}. {text}" for x, text in zip(letters, options, strict=True)],
    "answer": letters[options.index(truth["answer"])],
  }


def _list_wrong_answers(example: Example, rng: np.random.Generator) -> tuple[str, ...]:
  """Returns the world's wrong answers to a question, which records do not contain.

  Raises:
    ValueError: The world has no such question about the scene.
  """
  truth = example["truth"]
  content, kind = scene.scene_from_json(truth["scene"]), truth["kind"]
  for _ in range(MAX_TRIES):
    candidate = language.make_questions(content, rng).get(kind)
    if candidate and candidate.question == example["question"]:
      return candidate.wrong
  raise ValueError(
    f"{example['id']}: the world has no question {example['question']!r} about its "
    "scene: use the records that the world wrote"
  )


def _make_chair_row(example, name) -> dict[str, Any]:
  items = scene.scene_from_json(example["truth"]["scene"]).objects
  objects = sorted({item.shape for item in items})
  return {"image_id": name, "question": example["question"], "objects": objects}


def _make_mmhal_row(example, name) -> dict[str, Any]:
  truth = example["truth"]
  items = scene.scene_from_json(truth["scene"]).objects
  content = [f"{item.size} {item.color} {item.shape}" for item in items]
  return {
    "image_src": name,
    "question_type": truth["kind"],
    "question": example["question"],
    "image_content": content,
    "gt_answer": truth["answer"],
  }


def _make_refomb_row(example, name) -> dict[str, Any]:
  """Returns a row whose reference is a careless description, as in the data of SFT."""
  content = scene.scene_from_json(example["truth"]["scene"])
  rng = np.random.default_rng(zlib.crc32(str(example["id"]).encode()))
  return {
    "image_url": name,
    "question": example["question"],
    "description": example["truth"]["answer"],
    "type": language.NUMBERS[len(content.objects)],  # Number of objects.
    "answer": language.make_careless_description(content, rng),
  }


def _make_amber_rows(example) -> Iterator[tuple[Any, ...]]:
  """Yields (question, type, truth), and for descriptions also the absent shapes."""
  content = scene.scene_from_json(example["truth"]["scene"])
  items = content.objects
  shapes = [item.shape for item in items]
  present = [shape for shape in scene.SHAPES if shape in shapes]
  absent = [shape for shape in scene.SHAPES if shape not in shapes]
  yield example["question"], "generative", present, absent
  # Questions name objects by color, because no training question names a shape alone.
  rng = np.random.default_rng(zlib.crc32(str(example["id"]).encode()))
  missing = str(rng.choice(language.find_absent_colors(content)))
  for color, truth in ((items[0].color, "yes"), (missing, "no")):
    question = f"Is there a {color} object?"
    yield question, "discriminative-hallucination", truth
  for shape, truth in ((present[0], "yes"), (absent[0], "no")):
    question = f"Is the {items[shapes.index(present[0])].color} object a {shape}?"
    yield question, "discriminative-attribute-state", truth
  for left, right in itertools.pairwise(items):
    for one, other, truth in ((left, right, "yes"), (right, left, "no")):
      question = f"Is the {one.color} object left of the {other.color} object at first?"
      yield question, "discriminative-relation", truth


write_zero_shot_qa = _make_writer("zero_shot_qa", _make_qa_row, descriptions=False)
write_multiple_choice = _make_writer(
  "multiple_choice", _make_choice_row, descriptions=False
)
write_mmhal = _make_writer("mmhal", _make_mmhal_row, descriptions=False)
write_chair = _make_writer("chair", _make_chair_row, descriptions=True)
write_refomb = _make_writer("refomb", _make_refomb_row, descriptions=True)


# The judge with access to truth.


def judge_exactly(cases: Sequence[JudgeCase]) -> list[str | None]:
  """Returns BEST if every answer of a case is right, else WORST.

  If a case has a rival, the reply states which of both answers is better.
  """
  return [_compare(case) if case.rival else _rate(case) for case in cases]


def _rate(case: JudgeCase) -> str:
  matches = [is_same_answer(text or "", case.answer) for text in case.responses]
  return BEST if all(matches) else WORST


def _compare(case: JudgeCase) -> str:
  """Compares wrong statements, and then wrong or omitted ones."""
  [response] = case.responses
  count = lambda text: collections.Counter(language.split_claims(text))
  true, claims = count(case.answer), [count(case.rival), count(response or "")]
  wrong = [(each - true).total() for each in claims]
  mistakes = [n + (true - each).total() for n, each in zip(wrong, claims, strict=True)]
  fewer = lambda a, b: "[[A]]" if a < b else "[[B]]" if b < a else "[[C]]"
  return f"Fewer hallucinations: {fewer(*wrong)}\nBetter overall: {fewer(*mistakes)}"


EXACT = CaseJudge("exact", {"version": "1"}, judge_exactly)


def is_same_answer(text: str, answer: str) -> bool:
  """Returns whether a text is right word by word, with its sentences in any order."""
  split = lambda each: sorted(language.split_claims(each))
  return language.is_correct(text, answer) or split(text) == split(answer)
