"""Verdicts read strictly, and pairs kept only where both orders agree."""

import re

import pytest

from vlmrlaif_jax.data import prompts
from vlmrlaif_jax.feedback import pairwise_judge
from vlmrlaif_jax.feedback.pairwise_judge import AnswerPair, JudgeQuery, PairOutcome
from vlmrlaif_jax.feedback.replies.verdicts import parse_verdict


def test_verdict_is_read_from_what_the_prompts_ask_for():
  texts = [prompts.BETTER_VERDICT.format(side, "shorter") for side in "AB"] + [
    prompts.EQUAL_VERDICT
  ]
  assert [parse_verdict(text) for text in texts] == ["A", "B", "tie"]


@pytest.mark.parametrize(
  ("first", "second", "outcome"),
  [
    ("A", "B", PairOutcome("kept", 1)),
    ("B", "A", PairOutcome("kept", 2)),
    ("A", "A", PairOutcome("order_inconsistent")),
    ("B", "B", PairOutcome("order_inconsistent")),
    ("tie", "tie", PairOutcome("tie")),
    ("tie", "A", PairOutcome("tie")),
    ("B", "tie", PairOutcome("tie")),
    (None, "A", PairOutcome("unparsable")),
    ("B", None, PairOutcome("unparsable")),
    ("tie", None, PairOutcome("unparsable")),
    (None, None, PairOutcome("unparsable")),
  ],
)
def test_outcome_of_both_orders(first, second, outcome):
  assert pairwise_judge.combine_verdicts(first, second) == outcome


# Whole pairs. The judges are plain functions of the two outputs, as they stand.


def asking(prefer, asked=None):
  def ask(queries):
    if asked is not None:
      asked.extend(queries)
    found = [
      re.search(r"Output A: (.*) Output B: (.*) Which", q.prompt) for q in queries
    ]
    return [prefer(*match.groups()) for match in found]

  return ask


def pair(output_1, output_2, id="p"):
  return AnswerPair(id, "v.mp4", "What is it?", output_1, output_2)


def judged(pairs, prefer):
  made = pairwise_judge.judge_pairs(pairs, asking(prefer), prompts.BRIEF_PROMPTS)
  return [outcome._replace(verdicts=()) for outcome in made]


LONGER = lambda a, b: prompts.BETTER_VERDICT.format(
  "A" if len(a) > len(b) else "B", "longer"
)


def test_pair_is_kept_wherever_the_better_answer_stands():
  pairs = [pair("A red ball.", "A ball."), pair("A ball.", "A red ball.")]
  assert judged(pairs, LONGER) == [PairOutcome("kept", 1), PairOutcome("kept", 2)]


@pytest.mark.parametrize("side", ["A", "B"])
def test_judge_that_goes_by_place_has_no_say(side):
  pairs = [pair(f"{i}", f"{i + 1}") for i in range(20)]
  outcomes = judged(pairs, lambda a, b: prompts.BETTER_VERDICT.format(side, "there"))
  assert outcomes == [PairOutcome("order_inconsistent")] * 20


@pytest.mark.parametrize(
  ("output_1", "output_2", "reason"),
  [
    ("A ball.", "A  ball.\n", "identical"),
    ("", "A ball.", "empty"),
    ("A ball.", " \n", "empty"),
    ("", "", "empty"),
  ],
)
def test_pair_that_leaves_no_choice_is_not_asked_about(output_1, output_2, reason):
  asked = []
  made = pairwise_judge.judge_pairs(
    [pair(output_1, output_2)], asking(LONGER, asked), prompts.BRIEF_PROMPTS
  )
  assert (made, asked) == ([PairOutcome(reason)], [])


def test_prompt_too_long_in_one_order_is_too_long():
  one_order = lambda a, b: None if a == "A ball." else LONGER(a, b)
  assert judged([pair("A red ball.", "A ball.")], one_order) == [
    PairOutcome("too_long")
  ]


def test_judgements_stay_in_the_order_of_the_pairs():
  pairs = [pair("a", "a"), pair("aa", "a"), pair("", "a"), pair("a", "aa")]
  names = [(o.name, o.preference) for o in judged(pairs, LONGER)]
  assert names == [("identical", None), ("kept", 1), ("empty", None), ("kept", 2)]


def test_what_was_said_is_kept_in_both_orders():
  said = lambda a, b: f"Output A is better: {a}."
  [made] = pairwise_judge.judge_pairs(
    [pair("red", "blue")], asking(said), prompts.BRIEF_PROMPTS
  )
  texts = ("Output A is better: red.", "Output A is better: blue.")
  assert made == PairOutcome("order_inconsistent", verdicts=texts)


def test_query_holds_rules_narrative_question_and_answers():
  asked = []
  one = pair("red", "blue", id="7")._replace(narrative="A ball rolls.")
  pairwise_judge.judge_pairs([one], asking(LONGER, asked), prompts.BRIEF_PROMPTS)
  text = (
    "Compare two outputs. The accurate, helpful, natural and concise one is better. "
    "Context: A ball rolls. Question: What is it? Output A: {} Output B: {} Which is "
    "better?"
  )
  assert asked == [
    JudgeQuery("judge:AB:7", "v.mp4", text.format("red", "blue")),
    JudgeQuery("judge:BA:7", "v.mp4", text.format("blue", "red")),
  ]


@pytest.mark.parametrize(
  "outcome, won",
  [
    (PairOutcome("kept", 2), 1.0),
    (PairOutcome("kept", 1), 0.0),
    (PairOutcome("tie"), 0.5),
    (PairOutcome("order_inconsistent"), 0.5),
    (PairOutcome("unparsable"), None),
    (PairOutcome("empty"), None),
    (PairOutcome("too_long"), None),
  ],
)
def test_win(outcome, won):
  assert pairwise_judge.compute_win(outcome) == won
