"""Measures how well judges agree with human preferences, or with truth.

A judge chooses answer 1 or 2 of a pair; 0 is a tie and None an unreadable reply. A tie
or an unreadable reply never agrees with a preference. A random choice is therefore
right in half of all pairs.

MLLM-as-a-Judge (Chen et al. 2024, 2402.04788) has human scores and preferences.
Generative RLHF-V (2505.18531, table 1) measures judges by Pearson's correlation with
the human scores of its Score tasks. The paper does not specify whether the table pools
all data sets; this module pools them.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from vlmrlaif_jax.data.formats.video_files import find_video
from vlmrlaif_jax.data.records import Example, PreferenceExample, SkippedRecord
from vlmrlaif_jax.data.video import MediaList
from vlmrlaif_jax.evals import bootstrap
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.question_files import get_text, load_items

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
HUMAN_SCORE_KEYS = ("Human_answer", "human")
BETTER_OUTPUTS: dict[str, Literal[1, 2]] = {"A": 1, "B": 2}
PairChoice: TypeAlias = Literal[0, 1, 2] | None


class AnswerGroup(NamedTuple):
  """Answers to one question, with their scores."""

  id: str
  video: str | list[str] | MediaList
  question: str
  texts: tuple[str, ...]
  human: tuple[float, ...]  # Human scores, or scores by truth.

  def to_example(self) -> Example:
    """Returns an example with the group's question and video."""
    return {
      "id": self.id, "video": self.video, "question": self.question, "answer": "",
      "source": MLLM_JUDGE_SOURCE.name, "turns": [(self.question, "")],
    }  # fmt: skip


def make_pair(group: AnswerGroup) -> PreferenceExample | None:
  """Returns the first two answers whose scores differ, None if none do.

  The order is that of sampling, so each position is equally often the better one.
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
  """Returns the number of the answer with the higher score."""
  if scores is None:
    return None
  first, second = scores
  return 0 if first == second else 1 if first > second else 2


def measure_accuracy(
  choices: Sequence[PairChoice], better: Sequence[int], resampling: Resampling
) -> dict[str, Any]:
  """Returns the measures of a judge's choices, each an interval as a dict.

  Args:
    choices: The judge's choice for each pair.
    better: Number of the better answer of each pair.
    resampling: Settings of the bootstrap.

  Returns:
    "accuracy" is the share of pairs with the right choice. "tied" and "unread" are the
    shares without a choice. "slot_bias" is how much more often the judge chooses the
    first answer than it is better, over the pairs with a choice; it is left out if
    there are none.
  """
  numbers = np.array(choices, float)  # NaN for None.
  shares = {
    "accuracy": numbers == np.asarray(better),
    "tied": numbers == 0,
    "unread": np.isnan(numbers),
  }
  measures = {name: _measure(share, resampling) for name, share in shares.items()}
  is_choice = numbers > 0
  if is_choice.any():
    bias = (numbers == 1).astype(float) - (np.asarray(better) == 1)
    groups = itertools.compress(resampling.groups or range(len(numbers)), is_choice)
    resampling = resampling._replace(groups=list(groups))
    measures["slot_bias"] = _measure(bias[is_choice], resampling)
  return measures


def compare_accuracies(
  choices: Mapping[str, Sequence[PairChoice]],
  better: Sequence[int],
  resampling: Resampling,
) -> dict[str, Any]:
  """Returns the last judge's accuracy minus that of each other, on the same pairs."""
  hits = [(np.array(each, float) == better).astype(float) for each in choices.values()]
  *others, _ = zip(choices, hits, strict=True)
  return {name: _measure(hits[-1] - each, resampling) for name, each in others}


def _measure(values: np.ndarray, resampling: Resampling) -> dict[str, float]:
  return bootstrap.compute_mean_interval(values.astype(float), resampling)._asdict()


def correlate_with_people(
  groups: Sequence[AnswerGroup],
  scores: Sequence[Sequence[float | None]],
  resampling: Resampling,
) -> dict[str, float] | None:
  """Returns the correlation of a judge's scores with human scores.

  Args:
    groups: Groups of answers with human scores. Answers about one video are resampled
      together.
    scores: The judge's score of each answer, None for an answer without a score.
    resampling: Settings of the bootstrap, whose groups are ignored.

  Returns:
    An interval as a dict, None if either side's scores are constant.
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


def load_groups(
  path: pathlib.Path, videos: str, problems: list[SkippedRecord] | None = None
) -> list[AnswerGroup]:
  """Loads the groups of a file of Score tasks.

  Args:
    path: The file.
    videos: Folder of the videos or images.
    problems: Receives the skipped rows.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: The file has no usable row.
  """

  def make(number: int, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    text = get_text(row, HUMAN_SCORE_KEYS)
    try:
      human = float(text)
    except ValueError:
      raise ValueError(f"{HUMAN_SCORE_KEYS} must have a number, got {text!r}") from None
    video = find_video(videos, str(row["image_path"]))
    return f"{row['id']}:{row['image_path']}", {**row, "human": human, "video": video}

  rows_by_id: dict[str, list[dict[str, Any]]] = {}
  keys = ("image_path", "instruction", "id", "answer")
  for id, row in load_items(path, MLLM_JUDGE_SOURCE, make, problems, keys=keys):
    rows_by_id.setdefault(id, []).append(row)
  return [
    AnswerGroup(
      id,
      rows[0]["video"],
      str(rows[0]["instruction"]),
      tuple(str(row["answer"]) for row in rows),
      tuple(row["human"] for row in rows),
    )
    for id, rows in rows_by_id.items()
  ]


def load_pairs(
  path: pathlib.Path, videos: str, problems: list[SkippedRecord] | None = None
) -> list[PreferenceExample]:
  """Loads the preferences of a file of Pair tasks, without ties.

  Args:
    path: The file.
    videos: Folder of the videos or images.
    problems: Receives the skipped rows.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: The file has no usable row.
  """

  def make(number: int, row: dict[str, Any]) -> PreferenceExample | None:
    better = get_text(row, ("human_answer",))
    if better not in BETTER_OUTPUTS:  # "C" is a tie.
      return None
    sides = ("answer1", "answer2")
    if not all(isinstance(row[side], dict) for side in sides):
      raise ValueError("answer1 and answer2 must be objects with an answer")
    first, second = (get_text(row[side], ("answer",)) for side in sides)
    return {
      "id": str(row.get("pair_id", number)),
      "video": find_video(videos, get_text(row, ("image_path",))),
      "question": get_text(row, ("instruction",)),
      "output_1": first,
      "output_2": second,
      "preference": BETTER_OUTPUTS[better],
      "source": MLLM_JUDGE_SOURCE.name,
    }

  keys = ("image_path", "instruction", "answer1", "answer2", "human_answer")
  pairs = load_items(path, MLLM_JUDGE_SOURCE, make, problems, keys=keys)
  return [pair for pair in pairs if pair]
