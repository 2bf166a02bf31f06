"""Scores zero-shot QA on MSVD, MSRVTT and ActivityNet, as in Video-ChatGPT.

Follows Maaz et al. 2023 (2306.05424), 4.3: in one reply, a judge returns whether an
answer has the meaning of the right one, and a score of the match from 0 to 5.
"""

import functools

from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkItem
from vlmrlaif_jax.evals.judging import rate_items
from vlmrlaif_jax.feedback.replies.options import parse_yes_no
from vlmrlaif_jax.feedback.replies.scores import parse_score

KEYS = ("video_name", "question_id", "question", "answer")
SOURCE = protocol.Source(
  "zero-shot QA",
  "https://github.com/xudejing/video-question-answering (MSVD-QA, MSRVTT-QA) and "
  "https://github.com/MILVLG/activitynet-qa",
  """  QUESTIONS.json   [{"video_name": ..., "question_id": ..., "question": ...,
                     "answer": ...}, ...], where questions and answers that come in two
                   files are joined by "question_id"
  VIDEOS/          a folder
    NAME.mp4       by "video_name", with a suffix; ActivityNet's also as v_NAME.mp4""",
)
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


def load(config: ConfigDict) -> list[BenchmarkItem]:
  """Loads the items of the file."""
  once = "video_name", "question_id"
  items = []
  for row in protocol.read_records_list(config.questions, KEYS, SOURCE, once):
    id = ":".join(str(row[key]) for key in once)
    question = protocol.make_question(config, id, row["video_name"], row["question"])
    items.append(BenchmarkItem(question, str(row["answer"])))
  return items


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
