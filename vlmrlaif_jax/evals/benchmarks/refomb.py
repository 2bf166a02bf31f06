"""Scores RefoMB (RLAIF-V, Yu et al. 2024, 2405.17220): answers compared with GPT-4V's.

A judge reads a detailed description of the image, the question and both answers. It
returns which answer has fewer hallucinations and which is better. A win counts 1, a tie
0.5. The reference is answer A, as in RLAIF-V's script. The paper averages three or more
runs.

The prompt is our own and requests both verdicts in one reply. RLAIF-V's script sends a
second prompt, which summarizes the hallucinations of the first review. The scores are
therefore near the paper's, but not the same. Layout and formulas are those of RLAIF-V's
repository (dev split); the scoring of the test split is not published.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.data.records import SkippedRecord
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkItem
from vlmrlaif_jax.evals.judging import rate_items
from vlmrlaif_jax.evals.question_files import get_text, load_items
from vlmrlaif_jax.feedback.replies.verdicts import parse_named_verdict

KEYS = ("image_url", "question", "description", "type", "answer")
SOURCE = protocol.Source(
  "RefoMB",
  "https://github.com/RLHF-V/RLAIF-V (eval/data/gpt4v_RefoMB_dev_0521.jsonl)",
  """  QUESTIONS.jsonl  lines of {"image_url": "https://.../NAME.jpg", "question": ...,
                   "description": ..., "type": "Coarse Perception", "answer": ...},
                   where "answer" is GPT-4V's; RefoMB_dev.jsonl has none
  VIDEOS/          a folder of the images
    NAME.jpg       by the end of "image_url" """,
)
PROMPTS = {
  "compare": (
    "You compare two answers to a question about an image that you are told of.\n"
    "Description of the image, which leaves nothing out:\n{answer}\n"
    "Question: {question}\nAnswer A: {rival}\nAnswer B: {said}\n"
    "First find the hallucinations of each answer: whatever it states of the image "
    "that contradicts the description or is not in it, be it of things, people, "
    "numbers, positions, colors, texts, actions, of the image itself or of what it "
    "conveys. Where the question calls for something made up, such as a story, that "
    "may be.\n"
    "Then judge how helpful each is: whether it answers what was asked, correctly and "
    "clearly.\n"
    "End with two lines, where [[A]] is answer A, [[B]] answer B and [[C]] neither:\n"
    "Fewer hallucinations: [[A]], [[B]] or [[C]]\nBetter overall: [[A]], [[B]] or [[C]]"
  )
}
# Win of the policy's answer, which is answer B.
WINS = {"A": 0.0, "tie": 0.5, "B": 1.0, None: None}
VERDICT_NAMES = {
  "trustworthiness": "fewer hallucinations",
  "win_rate": "better overall",
}


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[BenchmarkItem]:
  """Loads the items of the file; `problems` receives the skipped rows."""

  def make(number: int, row: dict[str, Any]) -> BenchmarkItem:
    image, text, description, kind, answer = (get_text(row, (key,)) for key in KEYS)
    question = protocol.make_question(config, number, image, text)
    return BenchmarkItem(question, description, kind, rival=answer)

  return load_items(config.questions, SOURCE, make, problems, keys=KEYS)


def parse_two_verdicts(reply: str) -> dict[str, float] | None:
  """Returns the wins of both verdicts, None unless a reply has each exactly once.

  "win_rate" counts wins over the reference, with ties as half. "trustworthiness" does
  the same for hallucinations alone.
  """
  wins = {
    measure: WINS[parse_named_verdict(reply, name)]
    for measure, name in VERDICT_NAMES.items()
  }
  read = {measure: win for measure, win in wins.items() if win is not None}
  return read if len(read) == len(wins) else None


run = functools.partial(rate_items, prompt=PROMPTS["compare"], parse=parse_two_verdicts)
BENCHMARKS = (
  protocol.Benchmark(
    "refomb",
    SOURCE,
    load,
    run,
    prompts=PROMPTS,
    shares=("win_rate", "trustworthiness"),
    world=world_files.write_refomb,
  ),
)
