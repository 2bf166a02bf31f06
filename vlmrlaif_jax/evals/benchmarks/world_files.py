"""The embedded world's own benchmark in the layouts of the papers' benchmarks.

Every right answer is known to the word, so that of every measure the right value is.
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

TEMPORAL = ("motion", "event", "order")  # Kinds of question that speak of time.
# What a judge says of right answers, and of wrong ones.
BEST = '{"pred": "yes", "score": 5, "rating": 6}'
WORST = '{"pred": "no", "score": 0, "rating": 0}'
# Of consistency: two questions that a description answers.
TWICE = (language.DESCRIBE_EVENTS, BRIEF_PROMPTS.caption)
OPTIONS = 4  # Of a multiple choice, at most.
# The words for each class of objects.
OBJECTS = pathlib.Path(__file__).parents[2] / "assets" / "world_objects.json"
TRIES = 10_000  # Questions that are made about a scene, for one that is known.


def check_world_examples(examples: Sequence[Example]) -> None:
  """Checks that examples are of the embedded world.

  Raises:
    UserError: an example has no scene.
  """
  if not all("scene" in (e.get("truth") or {}) for e in examples):
    raise UserError(
      "only examples of the embedded world hold what a benchmark's files need: give "
      "files of your own as --config.evaluate.NAME.questions and .videos"
    )


# Each function `write_NAME` writes the files of a benchmark, from examples with truth,
# and returns the value of its setting `questions`. Videos are named from their folder.


def _is_description(example: Example) -> bool:
  return example["truth"]["kind"] == DESCRIPTION


def _writer(
  name: str, row: Callable[[Example, str], dict[str, Any]], *, descriptions: bool
) -> Callable[[pathlib.Path, Examples, str], pathlib.Path]:
  """Returns what writes a row for each description, or for each short question."""

  def write(folder: pathlib.Path, examples: Examples, videos: str) -> pathlib.Path:
    asked = [e for e in examples if _is_description(e) == descriptions]
    return _write(folder / f"{name}.json", [row(e, _name(e, videos)) for e in asked])

  return write


def write_videochatgpt(
  folder: pathlib.Path, examples: Examples, videos: str
) -> pathlib.Path:
  names = ("generic_qa", "temporal_qa", "consistency_qa")
  files: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
  for example in examples:
    named, answer = {"video_name": _name(example, videos)}, example["truth"]["answer"]
    about_time = example["truth"]["kind"] in TEMPORAL
    asked = {"Q": example["question"], "A": answer}
    files["temporal_qa" if about_time else "generic_qa"].append(named | asked)
    if _is_description(example):
      both = dict(zip(("Q1", "Q2"), TWICE, strict=True))
      files["consistency_qa"].append(named | both | {"A": answer})
  for name, rows in files.items():
    _write(folder / "videochatgpt" / f"{name}.json", rows)
  return folder / "videochatgpt"


def write_retrieval(
  folder: pathlib.Path, examples: Examples, videos: str
) -> pathlib.Path:
  rows = [
    {"video_id": name, "caption": language.describe_scene(seen)}
    for name, seen in _scenes(examples, videos).items()
  ]
  return _write(folder / "retrieval.json", {"sentences": rows})


def write_action(folder: pathlib.Path, examples: Examples, videos: str) -> pathlib.Path:
  """Names a video by what moves how at first: "moves_left_and_stays_still"."""
  lines: dict[str, str] = collections.defaultdict(str)
  for name, seen in _scenes(examples, videos).items():
    seen_to = {item.motion for item in seen.objects}
    moves = [x for x in language.MOVES if x.split()[-1] in seen_to]
    lines["_and_".join(moves).replace(" ", "_")] += f"{name} 2\n"
  for action, text in lines.items():
    _write(folder / "action" / f"{action}_test_split1.txt", text)
  return folder / "action"


def write_amber(folder: pathlib.Path, examples: Examples, videos: str) -> pathlib.Path:
  notes: list[dict[str, Any]] = []
  queries: list[dict[str, Any]] = []
  for example in filter(_is_description, examples):
    for asked, *truth in _amber(example):
      about: dict[str, Any] = {"id": len(notes) + 1}
      queries.append(about | {"image": _name(example, videos), "query": asked})
      facts = zip(("type", "truth", "hallu"), truth, strict=False)
      notes.append(about | dict(facts))
  _write(folder / "amber" / "annotations.json", notes)
  _write(folder / "amber" / "query" / "query_all.json", queries)
  _write(folder / "amber" / "relation.json", OBJECTS.read_text())
  _write(folder / "amber" / "safe_words.txt", "")
  return folder / "amber"


def _write(path: pathlib.Path, content: Any) -> pathlib.Path:
  """Writes a text as it is, and all else as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    content if isinstance(content, str) else json.dumps(content, indent=1)
  )
  return path


def _name(example: Example, videos: str | os.PathLike) -> str:
  """What a video is called in the files: from their folder, without its suffix."""
  return os.path.splitext(
    os.path.relpath(format_video_name(example["video"]), os.fspath(videos))
  )[0]


def _scenes(
  examples: Sequence[Example], videos: str | os.PathLike
) -> dict[str, scene.Scene]:
  """What each video shows, by name."""
  return {
    _name(e, videos): scene.scene_from_json(e["truth"]["scene"]) for e in examples
  }


def _qa(example: Example, name: str) -> dict[str, Any]:
  asked = {"question_id": example["id"], "question": example["question"]}
  return {"video_name": name, **asked, "answer": example["truth"]["answer"]}


def _choice(example: Example, name: str) -> dict[str, Any]:
  """The right answer to a question among wrong ones to the same, in any order."""
  truth = example["truth"]
  rng = np.random.default_rng(zlib.crc32(str(example["id"]).encode()))
  wrong = [str(said) for said in rng.permutation(_wrong(example, rng))]
  said = [str(x) for x in rng.permutation([truth["answer"], *wrong[: OPTIONS - 1]])]
  letters = string.ascii_uppercase[: len(said)]
  return {
    "videoID": name,
    "question_id": example["id"],
    "question": example["question"],
    "duration": "short",
    "domain": "embedded world",
    "task_type": truth["kind"],
    "options": [f"{x}. {text}" for x, text in zip(letters, said, strict=True)],
    "answer": letters[said.index(truth["answer"])],
  }


def _wrong(example: Example, rng: np.random.Generator) -> tuple[str, ...]:
  """The wrong answers that the world knows to a question; a record has none of them.

  Raises:
    ValueError: the world does not ask this of the scene.
  """
  seen, kind = (
    scene.scene_from_json(example["truth"]["scene"]),
    example["truth"]["kind"],
  )
  for _ in range(TRIES):
    made = language.make_questions(seen, rng).get(kind)
    if made and made.question == example["question"]:
      return made.wrong
  raise ValueError(
    f"{example['id']}: the world does not ask {example['question']!r} of its scene: "
    "take the records that the world wrote"
  )


def _chair(example, name) -> dict[str, Any]:
  shown = scene.scene_from_json(example["truth"]["scene"]).objects
  objects = sorted({item.shape for item in shown})
  return {"image_id": name, "question": example["question"], "objects": objects}


def _mmhal(example, name) -> dict[str, Any]:
  told, shown = (
    example["truth"],
    scene.scene_from_json(example["truth"]["scene"]).objects,
  )
  content = [f"{item.size} {item.color} {item.shape}" for item in shown]
  return {
    "image_src": name,
    "question_type": told["kind"],
    "question": example["question"],
    "image_content": content,
    "gt_answer": told["answer"],
  }


def _refomb(example, name) -> dict[str, Any]:
  """The reference describes without looking, as the data of SFT do."""
  seen = scene.scene_from_json(example["truth"]["scene"])
  rng = np.random.default_rng(zlib.crc32(str(example["id"]).encode()))
  return {
    "image_url": name,
    "question": example["question"],
    "description": example["truth"]["answer"],
    "type": language.NUMBERS[len(seen.objects)],  # Of objects.
    "answer": language.make_careless_description(seen, rng),
  }


def _amber(example) -> Iterator[tuple[Any, ...]]:
  """(question, type, truth and, of a description, what is not there)."""
  seen = scene.scene_from_json(example["truth"]["scene"])
  items = seen.objects
  shapes = [item.shape for item in items]
  there = [shape for shape in scene.SHAPES if shape in shapes]
  others = [shape for shape in scene.SHAPES if shape not in shapes]
  yield example["question"], "generative", there, others
  # Objects go by their color, and policies are never asked for a shape by itself.
  rng = np.random.default_rng(zlib.crc32(str(example["id"]).encode()))
  missing = str(rng.choice(language.find_absent_colors(seen)))
  for color, truth in ((items[0].color, "yes"), (missing, "no")):
    asked = f"Is there a {color} object?"
    yield asked, "discriminative-hallucination", truth
  for shape, truth in ((there[0], "yes"), (others[0], "no")):
    asked = f"Is the {items[shapes.index(there[0])].color} object a {shape}?"
    yield asked, "discriminative-attribute-state", truth
  for left, right in itertools.pairwise(items):
    for one, other, truth in ((left, right, "yes"), (right, left, "no")):
      asked = f"Is the {one.color} object left of the {other.color} object at first?"
      yield asked, "discriminative-relation", truth


write_zero_shot_qa = _writer("zero_shot_qa", _qa, descriptions=False)
write_multiple_choice = _writer("multiple_choice", _choice, descriptions=False)
write_mmhal = _writer("mmhal", _mmhal, descriptions=False)
write_chair = _writer("chair", _chair, descriptions=True)
write_refomb = _writer("refomb", _refomb, descriptions=True)


# The judge that knows all.


def judge_exactly(cases: Sequence[JudgeCase]) -> list[str | None]:
  """What somebody who knows all says: BEST if every answer is right, else WORST; of an
  answer and its rival, which one is better.
  """
  return [_compared(case) if case.rival else _rated(case) for case in cases]


def _rated(case: JudgeCase) -> str:
  right = all(is_same_answer(text or "", case.answer) for text in case.responses)
  return BEST if right else WORST


def _compared(case: JudgeCase) -> str:
  """By statements that are wrong, and by those that are wrong or left out."""
  [said], true = case.responses, collections.Counter(language.split_claims(case.answer))
  made = [
    collections.Counter(language.split_claims(text))
    for text in (case.rival, said or "")
  ]
  wrong = [(each - true).total() for each in made]
  mistakes = [n + (true - each).total() for n, each in zip(wrong, made, strict=True)]
  fewer = lambda a, b: "[[A]]" if a < b else "[[B]]" if b < a else "[[C]]"
  return f"Fewer hallucinations: {fewer(*wrong)}\nBetter overall: {fewer(*mistakes)}"


EXACT = CaseJudge("exact", {"version": "1"}, judge_exactly)


def is_same_answer(text: str, answer: str) -> bool:
  """Whether a text is right word by word, its sentences in any order."""
  stated = lambda said: sorted(language.split_claims(said))
  return language.is_correct(text, answer) or stated(text) == stated(answer)
