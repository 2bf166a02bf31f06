"""MLLM-as-a-Judge (Chen et al. 2024, 2402.04788): judges held against people.

Of its Score tasks, Pearson's correlation of a judge's scores with people's, as
Generative RLHF-V (2505.18531, table 1) measures judges; of its Pair tasks, preferences.
Whether that table takes all data sets together is not published; here they are.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.bootstrap import Resampling

SOURCE = protocol.Source(
  "MLLM-as-a-Judge",
  "https://github.com/Dongping-Chen/MLLM-Judge (Dataset/Benchmark, Dataset/image)",
  """  score.jsonl      lines of {"id": 100, "image_path": "image/100.jpg",
                   "instruction": ..., "answer": ..., "Human_answer": 3}, or "human"
  pair.jsonl       lines of {"pair_id": 5, "image_path": "0.jpg", "instruction": ...,
                   "answer1": {"answer": ...}, "answer2": {...}, "human_answer": "A"},
                   or "B"; "C", a tie, is left out
  VIDEOS/          a folder
    image/100.jpg  by "image_path" """,
)
HUMAN = ("Human_answer", "human")  # What people's scores are called.
BETTER: dict[str, Literal[1, 2]] = {"A": 1, "B": 2}


class Group(NamedTuple):
  """Answers to one question, and how good they are."""

  id: str
  video: str | list[str]
  question: str
  texts: tuple[str, ...]
  human: tuple[float, ...]  # People's scores, or truth's.

  def example(self) -> Example:
    return {
      "id": self.id, "video": self.video, "question": self.question, "answer": "",
      "source": SOURCE.name, "turns": [(self.question, "")],
    }  # fmt: skip


def pair_of(group: Group) -> PreferenceExample | None:
  """The first two answers that differ in their scores; None if none do.

  Answers that were sampled alike stand in either place equally often.
  """
  for i, j in itertools.combinations(range(len(group.texts)), 2):
    if group.human[i] != group.human[j]:
      return {
        "id": group.id,
        "video": group.video,
        "question": group.question,
        "source": SOURCE.name,
        "output_1": group.texts[i],
        "output_2": group.texts[j],
        "preference": 1 if group.human[i] > group.human[j] else 2,
      }
  return None


def load(path: pathlib.Path, videos: str) -> list[Group]:
  """The groups of a file of Score tasks.

  Raises:
    FileNotFoundError, ValueError: see protocol.read_list; or a score is no number.
  """
  found: dict[str, list[dict[str, Any]]] = {}
  for number, row in enumerate(_rows(path, ("id", "answer")), 1):
    try:
      human = float(next(row[key] for key in HUMAN if key in row))
    except (StopIteration, TypeError, ValueError):
      raise ValueError(
        f"{path}, record {number} has no score of {HUMAN}: {SOURCE.told()}"
      ) from None
    found.setdefault(f"{row['id']}:{row['image_path']}", []).append(
      {**row, "human": human}
    )
  return [
    Group(
      id,
      protocol.find_video(videos, rows[0]["image_path"]),
      str(rows[0]["instruction"]),
      tuple(str(row["answer"]) for row in rows),
      tuple(row["human"] for row in rows),
    )
    for id, rows in found.items()
  ]


def load_pairs(path: pathlib.Path, videos: str) -> list[PreferenceExample]:
  """The preferences of a file of Pair tasks, ties left out.

  Raises:
    FileNotFoundError, ValueError: see protocol.read_list.
  """
  rows = _rows(path, ("answer1", "answer2", "human_answer"))
  return [
    {
      "id": str(row.get("pair_id", number)),
      "video": protocol.find_video(videos, row["image_path"]),
      "question": str(row["instruction"]),
      "output_1": str(row["answer1"]["answer"]),
      "output_2": str(row["answer2"]["answer"]),
      "preference": BETTER[row["human_answer"]],
      "source": SOURCE.name,
    }
    for number, row in enumerate(rows, 1)
    if row["human_answer"] in BETTER
  ]


def _rows(path: pathlib.Path, keys: Sequence[str]) -> list[dict[str, Any]]:
  return protocol.read_list(path, ("image_path", "instruction", *keys), SOURCE)


def pearson(
  groups: Sequence[Group],
  scores: Sequence[Sequence[float | None]],
  how: Resampling,
) -> dict[str, float] | None:
  """The correlation of a judge's scores with people's, over the answers that it has
  scored, as a dict of an Interval; None where either does not vary. Answers about one
  video are drawn together.
  """
  rows = [
    (score, human, group.video)
    for group, each in zip(groups, scores, strict=True)
    for score, human in zip(each, group.human, strict=True)
    if score is not None
  ]
  judge, human = (np.array([row[i] for row in rows], float) for i in range(2))
  if not (len(rows) and judge.std() and human.std()):
    return None
  how = how._replace(groups=[str(row[2]) for row in rows])
  return bootstrap.correlation_interval(judge, human, how)._asdict()
