"""Thoughts are removed, and any text is read without an error and soon."""

import random

import pytest

from tests.feedback.replies.test_lists import LISTS
from tests.feedback.replies.test_options import CHOICES, OTHER_NAMES, YES_NO
from tests.feedback.replies.test_rankings import RANKINGS
from tests.feedback.replies.test_scores import BOXES, SCORES
from tests.feedback.replies.test_verdicts import THOUGHTS, VERDICTS
from vlmrlaif_jax.feedback.replies.cleaning import clean_reply, strip_thoughts
from vlmrlaif_jax.feedback.replies.lists import parse_list
from vlmrlaif_jax.feedback.replies.options import parse_choice, parse_yes_no
from vlmrlaif_jax.feedback.replies.rankings import parse_ranking
from vlmrlaif_jax.feedback.replies.scores import parse_boxed_scores, parse_score
from vlmrlaif_jax.feedback.replies.verdicts import parse_named_verdict, parse_verdict

PARSERS = (
  parse_verdict,
  parse_yes_no,
  parse_list,
  lambda text: parse_score(text, high=5),
  lambda text: parse_choice(text, OTHER_NAMES),
  lambda text: parse_ranking(text, 3),
  lambda text: parse_boxed_scores(text),
  lambda text: parse_named_verdict(text, "better overall"),
)
TABLES = (THOUGHTS, VERDICTS, YES_NO, SCORES, LISTS, CHOICES, RANKINGS, BOXES)
FRAGMENTS = sorted(
  {word for table in TABLES for row in table for word in row[0].split(" ")}
  | {
    "\n",
    "  ",
    "```",
    "[[",
    "]]",
    "{",
    "}",
    "\\boxed{",
    "(",
    "- ",
    "1.",
    "\x00",
    "\ud83d",
  }
)


def test_a_mixture_of_replies_raises_no_error():
  rng = random.Random(16)
  for _ in range(2000):
    words = rng.choices(FRAGMENTS, k=rng.randrange(20))
    text = rng.choice(["", " ", " ", "\n"]).join(words)
    for parse in PARSERS:
      parse(text)


UNITS = [
  "a", " ", "\n", "(", "[[", "<think>", "</think>", "<answer>", "1, ", "1 > ", "1. A. ",
  "- ", "{", "[", "\\boxed{", "answer: ", "score ", "Output A is better. ", "A, B ",
  "*", "is the best ", "不", "yes ", "answer is ", "```\n", "a " * 50,
  "Verdict: A\n", "<",
]  # fmt: skip


@pytest.mark.parametrize("parse", PARSERS)
def test_a_long_reply_ends(parse):
  for unit in UNITS:
    parse(unit * (10_000 // len(unit)))


@pytest.mark.parametrize("unit", ["<", "Output A is better. "])
def test_a_reply_of_a_megabyte_ends(unit):
  for parse in PARSERS:
    parse(unit * (1_000_000 // len(unit)))


def test_a_thought_that_is_open_leaves_nothing():
  assert strip_thoughts("A <think>b") is None
  assert clean_reply("A <think>b") == ""
