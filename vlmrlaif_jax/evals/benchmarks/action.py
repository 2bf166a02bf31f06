"""Action recognition by what a policy says of each video, of UCF101 and HMDB51.

As VLM-Eval (Li et al. 2023, 2311.11865), which VLM-RLAIF follows: of the names of all
actions, which are most alike what was said? Names are written as its code does:
"ApplyEyeMakeup" is "Apply eye makeup", "brush_hair" is "brush hair".
"""

import pathlib
import re
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

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
TESTED = "2"  # Of HMDB51's marks: 1 is for training, 0 for neither.
SETTINGS = {
  "split": 1,  # Of HMDB51's three.
  # One of VLM-Eval's eleven.
  "question": "Describe the main action in the video concisely.",
}


def load(config: ConfigDict) -> list[BenchmarkItem]:
  """The test videos."""
  path = pathlib.Path(config.questions)
  if not path.exists():
    raise FileNotFoundError(f"nothing at {path}: {SOURCE.describe()}")
  rows = _hmdb51(path, config.split) if path.is_dir() else _ucf101(path)
  if len({action for action, _ in rows}) < 2:
    raise ValueError(f"{path} has no two actions to choose from: {SOURCE.describe()}")
  return [
    BenchmarkItem(
      BenchmarkQuestion(
        f"{action}/{name}", _video(config.videos, action, name), config.question
      ),
      split_action_name(action),
    )
    for action, name in rows
  ]


def _ucf101(path: pathlib.Path) -> list[tuple[str, str]]:
  rows = [line.split()[0].partition("/") for line in path.read_text().splitlines()
          if line.strip()]  # fmt: skip
  if not all(name for _, _, name in rows):
    raise ValueError(f"{path} must hold lines of ACTION/NAME.avi: {SOURCE.describe()}")
  return [(action, name) for action, _, name in rows]


def _hmdb51(folder: pathlib.Path, split: int) -> list[tuple[str, str]]:
  rows, ending = [], f"_test_split{split}.txt"
  for path in sorted(folder.glob(f"*{ending}")):
    pairs = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if not all(len(pair) == 2 for pair in pairs):
      raise ValueError(f"{path} must hold lines of a name and a mark: {SOURCE.describe()}")
    action = path.name.removesuffix(ending)
    rows += [(action, name) for name, mark in pairs if mark == TESTED]
  return rows


def _video(folder: str, action: str, name: str) -> str:
  inside = protocol.find_video(pathlib.Path(folder) / action, name)
  return inside if pathlib.Path(inside).exists() else protocol.find_video(folder, name)


def split_action_name(action: str) -> str:
  """The name of an action: "ApplyEyeMakeup" -> "Apply eye makeup"."""
  first, *rest = re.findall(r"[A-Z]?[^A-Z_]+|[A-Z]+", action)
  return " ".join([first, *(word.lower() for word in rest)])


def run(
  items: Sequence[BenchmarkItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns whether the action of each video is among the most alike: top1, top5."""
  names = sorted({item.answer for item in items})
  texts = model.answer([item.question for item in items])
  there = [i for i, text in enumerate(texts) if text is not None]
  alike = model.similarity.compare([texts[i] or "" for i in there], names)
  right = np.array([names.index(items[i].answer) for i in there], int)
  found = dict(zip(there, count_hits(alike, right, "top"), strict=True))
  return [
    protocol.make_rule_case(item.question, found.get(i), item.answer)
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
