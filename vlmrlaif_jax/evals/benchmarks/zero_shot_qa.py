"""Scores zero-shot QA on MSVD, MSRVTT and ActivityNet, as in Video-ChatGPT.

Follows Maaz et al. 2023 (2306.05424), 4.3: in one reply, a judge returns whether an
answer has the meaning of the right one, and a score of the match from 0 to 5.
"""

import functools
import pathlib
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.data.formats.video_files import find_video
from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkItem, BenchmarkQuestion
from vlmrlaif_jax.evals.judging import rate_items
from vlmrlaif_jax.evals.question_files import (
  ANSWER_KEYS,
  QUESTION_ID_KEYS,
  QUESTION_KEYS,
  get_text,
  get_video_names,
  load_items,
  read_answers,
)
from vlmrlaif_jax.feedback.replies.options import parse_yes_no
from vlmrlaif_jax.feedback.replies.scores import parse_score

SOURCE = protocol.Source(
  "zero-shot QA",
  "https://github.com/xudejing/video-question-answering (MSVD-QA, MSRVTT-QA), "
  "https://github.com/MILVLG/activitynet-qa and https://github.com/YunseokJANG/tgif-qa",
  """  QUESTIONS        .json, .jsonl, .csv, .tsv or .parquet:
                   [{"video_id": 1301, "id": 30933, "question": ..., "answer": ...},
                    ...], or with "video_name" and "question_id" (Video-ChatGPT), or
                   "gif_name" (TGIF-QA). ActivityNet-QA's test_q.json reads the answers
                   of test_a.json next to it
  VIDEOS/          a folder
    NAME.mp4       by "video_name", with any suffix; ActivityNet's also as v_NAME.mp4,
                   MSVD's as vid1301.avi, or by the names of a youtube_mapping.txt in
                   this folder or next to the questions; MSRVTT's as video7010.mp4""",
)
MAPPING = "youtube_mapping.txt"  # MSVD's lines of a video's name and vid1301.
PROMPTS = {
  "qa": (
    "You check answers to questions about videos. Does the predicted answer mean the "
    "same as the correct answer?\n"
    "- It is the meaning that must match, and not the words.\n"
    "- Synonyms and paraphrases count as a match.\n"
    "Question: {question}\nCorrect answer: {answer}\nPredicted answer: {said}\n"
    "Say yes or no, and give a whole number from 0 to 5 for how well it matches, where "
    "5 is best. Reply with a Python dictionary and nothing else, such as "
    '{{"pred": "yes", "score": 4}}.'
  )
}


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[BenchmarkItem]:
  """Loads the items of the file; `problems` receives the skipped rows."""
  path = pathlib.Path(config.questions)
  answers, published = read_answers(path), _read_mapping(path.parent, config.videos)
  seen: set[str] = set()

  def make(number: int, row: dict[str, Any]) -> BenchmarkItem:
    names = get_video_names(row)
    key = (
      get_text(row, QUESTION_ID_KEYS)
      if any(k in row for k in QUESTION_ID_KEYS)
      else str(number)
    )
    id = f"{names[0]}:{key}"
    if id in seen:
      raise ValueError(f"question_id {id} is there twice")
    answer = get_text(
      {**row, "answer": answers[key]} if key in answers else row, ANSWER_KEYS
    )
    names += tuple(published[name] for name in names if name in published)
    text = get_text(row, QUESTION_KEYS)
    video = find_video(config.videos, *names)
    seen.add(id)
    return BenchmarkItem(BenchmarkQuestion(id, video, text), answer)

  return load_items(path, SOURCE, make, problems)


def _read_mapping(*folders: pathlib.Path | str) -> dict[str, str]:
  """Returns YouTube's name of each of MSVD's videos, {} without the file."""
  for path in (pathlib.Path(folder) / MAPPING for folder in folders):
    if path.is_file():
      lines = (line.split() for line in path.read_text().splitlines())
      return {line[-1]: line[0] for line in lines if len(line) > 1}
  return {}


def parse_judgement(text: str) -> dict[str, float] | None:
  """Returns a reply's "accuracy" and "score"; None if either is missing."""
  is_right, score = parse_yes_no(text), parse_score(text, high=5)
  if is_right is None or score is None:
    return None
  return {"accuracy": float(is_right), "score": score}


run = functools.partial(rate_items, prompt=PROMPTS["qa"], parse=parse_judgement)
_QA = protocol.Benchmark(
  "zero_shot_qa",
  SOURCE,
  load,
  run,
  prompts=PROMPTS,
  world=world_files.write_zero_shot_qa,
)
BENCHMARKS = (
  _QA,
  _QA._replace(name="msvd_qa", world=None),
  _QA._replace(name="msrvtt_qa", world=None),
  _QA._replace(name="activitynet_qa", world=None),
)
