"""The embedded world's own benchmark in the layouts of the papers' benchmarks.

Every right answer is known to the word, so that of every measure the right value is.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from vlmrlaif_jax.data.prompts import BRIEF
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.evals.benchmark import Case, Judge
from vlmrlaif_jax.evals.world import DESCRIPTION

TEMPORAL = ("motion", "event", "order")  # Kinds of question that speak of time.
# Of consistency: two questions that a description answers.
TWICE = (language.HAPPENS, BRIEF.caption)


def write(folder: pathlib.Path, examples: Sequence[Example], videos: str | os.PathLike):
  """Writes generic_qa.json, temporal_qa.json, consistency_qa.json, zero_shot_qa.json,
  chair.json.

  Args:
    examples: with truth; those of the benchmark split.
    videos: the folder that videos are named from, without their suffix.

  Raises:
    ValueError: they are not of the embedded world.
  """
  if not all("scene" in (e.get("truth") or {}) for e in examples):
    raise ValueError(
      "only of the embedded world can the benchmarks' files be written: give the files "
      "of your own as --config.benchmarks.NAME.questions and .videos"
    )
  folder.mkdir(parents=True, exist_ok=True)
  for name, rows in _files(examples, videos).items():
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))


def _files(examples, videos) -> dict[str, list[dict[str, Any]]]:
  files = {
    "generic_qa": [],
    "temporal_qa": [],
    "consistency_qa": [],
    "zero_shot_qa": [],
    "chair": [],
  }
  for example in examples:
    kind, answer = example["truth"]["kind"], example["truth"]["answer"]
    named = {
      "video_name": os.path.splitext(os.path.relpath(example["video"], videos))[0]
    }
    asked = {"Q": example["question"], "A": answer}
    files["temporal_qa" if kind in TEMPORAL else "generic_qa"].append(named | asked)
    if kind == DESCRIPTION:
      both = dict(zip(("Q1", "Q2"), TWICE, strict=True))
      files["consistency_qa"].append(named | both | {"A": answer})
      files["chair"].append(_chair(example, named["video_name"]))
    else:
      about = {"question_id": example["id"], "question": example["question"]}
      files["zero_shot_qa"].append(named | about | {"answer": answer})
  return files


def _chair(example, name) -> dict[str, Any]:
  shown = scene.from_json(example["truth"]["scene"]).objects
  objects = sorted({item.shape for item in shown})
  return {"image_id": name, "question": example["question"], "objects": objects}


def exact(cases: Sequence[Case]) -> list[str | None]:
  """What somebody who knows all says: 5 and yes if every answer is right, else 0."""
  right = [
    all(says_the_same(text, case.answer) for text in case.said) for case in cases
  ]
  return ['{"pred": "yes", "score": 5}' if r else '{"pred": "no", "score": 0}'
          for r in right]  # fmt: skip


EXACT = Judge("exact", {"version": "1"}, exact)


def says_the_same(text: str, answer: str) -> bool:
  """Whether a text is right word by word, its sentences in any order."""
  stated = lambda said: sorted(language.claims(said))
  return language.is_right(text, answer) or stated(text) == stated(answer)
