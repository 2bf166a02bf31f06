"""Prompts for captions, judges, reward models and checks of answers.

`PAPER_PROMPTS` follows VLM-RLAIF (2402.03746). The judge's prompt is not published, so
its rules are the four qualities in the reward prompt. `BRIEF_PROMPTS` has short
versions for very small models.
"""

from typing import NamedTuple


class Prompts(NamedTuple):
  """The prompts of one style, with fields for str.format."""

  caption: str  # Prompt for every clip, whose captions form the narrative.
  judge: str  # Fields: {context}, {question}, {a}, {b}.
  context: str  # Field: {narrative}. Replaces {context} if there is a narrative.
  # A further question, which follows an answer in the template of the model, and the
  # start of the reply, whose last token carries the reward.
  reward: str
  reward_reply: str
  check: str  # Follow-up question whether the answer is right.


BRIEF_PROMPTS = Prompts(
  caption="Describe this video in detail.",
  judge=(
    "Compare two outputs. The accurate, helpful, natural and concise one is better."
    "{context} Question: {question} Output A: {a} Output B: {b} Which is better?"
  ),
  context=" Context: {narrative}",
  # Equal to `check`, on which the small models are trained.
  reward="Is your last answer right?",
  reward_reply="",
  check="Is your last answer right?",
)

PAPER_PROMPTS = Prompts(
  caption="Describe this video in detail.",
  judge=(
    "You are given a question about a video and two outputs that answer it. Decide "
    "which output is better.\nRules:\n"
    "1. Accurate: what it says is borne out by the video; it invents nothing and "
    "contradicts nothing.\n"
    "2. Helpful: it gives the asker just what the question calls for.\n"
    "3. Natural: it reads well and does not repeat itself.\n"
    "4. Concise: it is brief and clear.\n"
    "The order of the outputs must not sway you.{context}\n"
    "Question: {question}\nOutput A: {a}\nOutput B: {b}\n"
    'Answer with "Output A is better because" or "Output B is better because" and '
    'the reason, or with "Both outputs are equally good".'
  ),
  context="\nWhat is seen in the parts of the video, in order of time: {narrative}",
  reward=(
    "Please judge the quality of your last response by these measures. "
    "Accurate: it agrees with the video and states nothing that the video does not "
    "support. Helpful: it serves what the user asked for, and rests on the video. "
    "Natural: its language flows, without repetition or awkward turns. Concise: it "
    "does its task briefly and clearly. A good response is all four."
  ),
  reward_reply="Following these measures, the quality score of my last response is",
  check="Is your last answer right?",
)

PROMPT_STYLES = {"brief": BRIEF_PROMPTS, "paper": PAPER_PROMPTS}
BETTER_VERDICT = "Output {} is better because it is {}."  # Form of a verdict.
EQUAL_VERDICT = "Both outputs are equally good."


def format_judge_prompt(
  prompts: Prompts, *, question: str, a: str, b: str, narrative: str = ""
) -> str:
  """Formats the prompt for a comparison of two answers.

  Args:
    prompts: Style of the prompt.
    question: Question about the video.
    a: First answer.
    b: Second answer.
    narrative: Captions of the clips in order of time; "" omits the context.
  """
  context = prompts.context.format(narrative=narrative) if narrative else ""
  return prompts.judge.format(context=context, question=question, a=a, b=b)
