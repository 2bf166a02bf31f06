"""What the pipeline asks of a model, in words: one place for every task's prompt.

`PAPER` follows VLM-RLAIF (2402.03746) in substance: the judge's own prompt is not
published, so its rules are the four qualities that the reward prompt names. `BRIEF`
says the same in few words, for models of very few parameters.
"""

from typing import NamedTuple


class Prompts(NamedTuple):
  """The texts of one style. {} fields are filled by the functions that use them."""

  caption: str  # Asked of every clip; the answers make up the narrative.
  judge: str  # With {context}, {question}, {a}, {b}.
  context: str  # With {narrative}; put in the judge's {context}, if there is any.
  reward: str  # Right after an answer's end; the reward is read at its last token.
  check: str  # A follow-up question: is that answer right?


BRIEF_PROMPTS = Prompts(
  caption="Describe this video in detail.",
  judge=(
    "Compare two outputs. The accurate, helpful, natural and concise one is better."
    "{context} Question: {question} Output A: {a} Output B: {b} Which is better?"
  ),
  context=" Context: {narrative}",
  # The check's own words: a small model knows what was asked of it before.
  reward="USER: Is your last answer right? ASSISTANT:",
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
    " USER: Please judge the quality of your last response by these measures. "
    "Accurate: it agrees with the video and states nothing that the video does not "
    "support. Helpful: it serves what the user asked for, and rests on the video. "
    "Natural: its language flows, without repetition or awkward turns. Concise: it "
    "does its task briefly and clearly. A good response is all four."
    " ASSISTANT: Following these measures, the quality score of my last response is"
  ),
  check="Is your last answer right?",
)

PROMPT_STYLES = {"brief": BRIEF_PROMPTS, "paper": PAPER_PROMPTS}
BETTER_VERDICT = "Output {} is better because it is {}."  # How a verdict opens.
EQUAL_VERDICT = "Both outputs are equally good."


def format_judge_prompt(
  prompts: Prompts, *, question: str, a: str, b: str, narrative: str = ""
) -> str:
  """The text that asks which of two answers is better; no context if no narrative."""
  context = prompts.context.format(narrative=narrative) if narrative else ""
  return prompts.judge.format(context=context, question=question, a=a, b=b)
