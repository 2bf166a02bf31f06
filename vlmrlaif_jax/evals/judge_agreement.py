"""Judges held against people, or against truth: what they choose, and how they score.

Of two answers a judge chooses 1, 2, or 0 for a tie; None if what it said cannot be
read. Neither a tie nor an unread reply agrees with a preference, so guessing is right
in half of all pairs and silence in none.

MLLM-as-a-Judge (Chen et al. 2024, 2402.04788) is people's scores and preferences. Of
its Score tasks, Pearson's correlation of a judge's scores with people's is what
Generative RLHF-V (2505.18531, table 1) measures judges by. Whether that table takes all
data sets together is not published; here they are.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.bootstrap import Resampling

MLLM_JUDGE_SOURCE = protocol.Source(
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
BETTER_OUTPUTS: dict[str, Literal[1, 2]] = {"A": 1, "B": 2}
PairChoice: TypeAlias = Literal[0, 1, 2] | None


class AnswerGroup(NamedTuple):
  """Answers to one question, and how good they are."""

  id: str
  video: str | list[str]
  question: str
  texts: tuple[str, ...]
  human: tuple[float, ...]  # People's scores, or truth's.

  def to_example(self) -> Example:
    return {
      "id": self.id, "video": self.video, "question": self.question, "answer": "",
      "source": MLLM_JUDGE_SOURCE.name, "turns": [(self.question, "")],
    }  # fmt: skip


def make_pair(group: AnswerGroup) -> PreferenceExample | None:
  """The first two answers that differ in their scores; None if none do.

  Answers that were sampled alike stand in either place equally often.
  """
  for i, j in itertools.combinations(range(len(group.texts)), 2):
    if group.human[i] != group.human[j]:
      return {
        "id": group.id,
        "video": group.video,
        "question": group.question,
        "source": MLLM_JUDGE_SOURCE.name,
        "output_1": group.texts[i],
        "output_2": group.texts[j],
        "preference": 1 if group.human[i] > group.human[j] else 2,
      }
  return None


def choose_by_scores(scores: tuple[float, float] | None) -> PairChoice:
  """The answer that has the higher score."""
  if scores is None:
    return None
  first, second = scores
  return 0 if first == second else 1 if first > second else 2


def measure_accuracy(
  choices: Sequence[PairChoice], better: Sequence[int], resampling: Resampling
) -> dict[str, Any]:
  """What a judge is worth: intervals by name, as dicts.

  "accuracy": share of the pairs that it agrees on. "tied", "unread": of those that it
  does not choose in. "slot_bias": by how much more often it chooses the first than the
  first is better, where it chooses; left out where it never does.
  """
  said = np.array(choices, float)  # NaN for None.
  shares = {
    "accuracy": said == np.asarray(better),
    "tied": said == 0,
    "unread": np.isnan(said),
  }
  found = {name: _interval(share, resampling) for name, share in shares.items()}
  chose = said > 0
  if chose.any():
    more = (said == 1).astype(float) - (np.asarray(better) == 1)
    groups = itertools.compress(resampling.groups or range(len(said)), chose)
    found["slot_bias"] = _interval(more[chose], resampling._replace(groups=list(groups)))
  return found


def compare_accuracies(
  choices: Mapping[str, Sequence[PairChoice]], better: Sequence[int], resampling: Resampling
) -> dict[str, Any]:
  """How much more accurate the last judge is than each other, on the same pairs."""
  right = [(np.array(each, float) == better).astype(float) for each in choices.values()]
  *others, _ = zip(choices, right, strict=True)
  return {name: _interval(right[-1] - each, resampling) for name, each in others}


def _interval(values: np.ndarray, resampling: Resampling) -> dict[str, float]:
  return bootstrap.compute_mean_interval(values.astype(float), resampling)._asdict()


def correlate_with_people(
  groups: Sequence[AnswerGroup],
  scores: Sequence[Sequence[float | None]],
  resampling: Resampling,
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
  resampling = resampling._replace(groups=[str(row[2]) for row in rows])
  return bootstrap.compute_correlation_interval(judge, human, resampling)._asdict()


# The files of MLLM-as-a-Judge.


def load_groups(path: pathlib.Path, videos: str) -> list[AnswerGroup]:
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
        f"{path}, record {number} has no score of {HUMAN}: {MLLM_JUDGE_SOURCE.told()}"
      ) from None
    found.setdefault(f"{row['id']}:{row['image_path']}", []).append(
      {**row, "human": human}
    )
  return [
    AnswerGroup(
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
      "preference": BETTER_OUTPUTS[row["human_answer"]],
      "source": MLLM_JUDGE_SOURCE.name,
    }
    for number, row in enumerate(rows, 1)
    if row["human_answer"] in BETTER_OUTPUTS
  ]


def _rows(path: pathlib.Path, keys: Sequence[str]) -> list[dict[str, Any]]:
  return protocol.read_records_list(
    path, ("image_path", "instruction", *keys), MLLM_JUDGE_SOURCE
  )
