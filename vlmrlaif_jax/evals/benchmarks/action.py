"""Scores zero-shot action recognition on UCF101 and HMDB51.

Follows VLM-Eval (Li et al. 2023, 2311.11865), which VLM-RLAIF uses. The policy
describes each video, and the names of all actions are ranked by their similarity to
the description. Names are spelled as in VLM-Eval's code: "ApplyEyeMakeup" becomes
"Apply eye makeup", and "brush_hair" becomes "brush hair".
"""

import pathlib
import re
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.data.formats.video_files import find_video
from vlmrlaif_jax.data.records import SkippedRecord, format_skipped_records
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkItem,
  BenchmarkModel,
  BenchmarkQuestion,
  CaseJudge,
  ScoredCase,
)
from vlmrlaif_jax.evals.text_similarity import count_hits

SOURCE = protocol.Source(
  "action recognition",
  "https://www.crcv.ucf.edu/data/UCF101.php (UCF101TrainTestSplits) and "
  "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database "
  "(test_train_splits)",
  """  QUESTIONS.txt               UCF101's testlist01.txt: lines such as
                              ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi, or
  QUESTIONS/                  HMDB51's folder testTrainMulti_7030_splits
    brush_hair_test_split1.txt  lines of NAME.avi and 2 where it is to be tested on
  VIDEOS/                     a folder
    ApplyEyeMakeup/NAME.avi   by action and name, or by name alone""",
)
TEST_MARK = "2"  # HMDB51's mark of a test video; 1 marks training, 0 neither.
SETTINGS = {
  "split": 1,  # One of HMDB51's three splits.
  # One of VLM-Eval's eleven prompts.
  "question": "Describe the main action in the video concisely.",
}


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[BenchmarkItem]:
  """Loads the test videos; `problems` receives the skipped lines."""
  path = pathlib.Path(config.questions)
  if not path.exists():
    raise FileNotFoundError(f"no file or folder at {path}: {SOURCE.describe()}")
  skipped: list[SkippedRecord] = []
  if path.is_dir():
    rows = _read_hmdb51(path, config.split, skipped)
  else:
    rows = _read_ucf101(path, skipped)
  if problems is not None:
    problems += skipped
  if len({action for action, _ in rows}) < 2:
    raise ValueError(
      f"{path} must have two or more actions to choose from. "
      f"{format_skipped_records(skipped, total=len(skipped) + len(rows))}\n"
      + SOURCE.describe()
    )
  return [
    BenchmarkItem(
      BenchmarkQuestion(
        f"{action}/{name}", _find_video(config.videos, action, name), config.question
      ),
      split_action_name(action),
    )
    for action, name in rows
  ]


def _read_lines(path: pathlib.Path) -> list[tuple[str, list[str]]]:
  """Returns the place and the words of each line that is not blank."""
  lines = enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
  return [(f"{path.name}, line {n}", x.split()) for n, x in lines if x.strip()]


def _read_ucf101(
  path: pathlib.Path, problems: list[SkippedRecord]
) -> list[tuple[str, str]]:
  rows = []
  for place, (first, *_) in _read_lines(path):
    action, _, name = first.partition("/")
    if action and name:
      rows.append((action, name))
    else:
      problems.append(SkippedRecord(place, "it is not ACTION/NAME.avi"))
  return rows


def _read_hmdb51(
  folder: pathlib.Path, split: int, problems: list[SkippedRecord]
) -> list[tuple[str, str]]:
  rows, ending = [], f"_test_split{split}.txt"
  for path in sorted(folder.glob(f"*{ending}")):
    action = path.name.removesuffix(ending)
    for place, words in _read_lines(path):
      if len(words) != 2:
        problems.append(SkippedRecord(place, "it is not a name and a mark"))
      elif words[1] == TEST_MARK:
        rows.append((action, words[0]))
  return rows


def _find_video(folder: str, action: str, name: str) -> str:
  path = find_video(folder, f"{action}/{name}")
  return path if pathlib.Path(path).exists() else find_video(folder, name)


def split_action_name(action: str) -> str:
  """Splits the name of an action into words: "ApplyEyeMakeup" -> "Apply eye makeup"."""
  first, *rest = re.findall(r"[A-Z]?[^A-Z_]+|[A-Z]+", action)
  return " ".join([first, *(word.lower() for word in rest)])


def run(
  items: Sequence[BenchmarkItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns whether each video's action ranks first (top1) or in the first five."""
  names = sorted({item.answer for item in items})
  texts = model.answer([item.question for item in items])
  answered = [i for i, text in enumerate(texts) if text is not None]
  scores = model.similarity.compare([texts[i] or "" for i in answered], names)
  labels = np.array([names.index(items[i].answer) for i in answered], int)
  hits = dict(zip(answered, count_hits(scores, labels, "top"), strict=True))
  return [
    protocol.make_rule_case(item.question, hits.get(i), item.answer)
    for i, item in enumerate(items)
  ]


_ACTION = protocol.Benchmark(
  "action",
  SOURCE,
  load,
  run,
  settings=SETTINGS,
  scoring="similarity",
  shares=("top1", "top5"),
  world=world_files.write_action,
)
BENCHMARKS = (
  _ACTION,
  _ACTION._replace(name="ucf101", world=None),
  _ACTION._replace(name="hmdb51", world=None),
)
