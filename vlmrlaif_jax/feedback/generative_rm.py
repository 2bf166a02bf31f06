r"""A generative reward model: it makes up criteria, analyses, and scores two answers.

Generative RLHF-V (2505.18531). Its judge is taught by RL, from preferences and a rule:
does the better answer get the higher score? A group of responses is then scored by
comparing them with each other. Whatever scores a group is a `Compare`. A comparison
that cannot be read is dropped, and a response without any is not valid; nothing is
filled in for it.
"""

import hashlib
import itertools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from vlmrlaif_jax.data import prompts
from vlmrlaif_jax.data.prompts import format_judge_prompt
from vlmrlaif_jax.data.records import Example, PreferenceExample, order_by_preference
from vlmrlaif_jax.feedback.pairwise_judge import (
  AskFn,
  JudgeQuery,
  ask_unique,
  join_lines,
  make_query_key,
  parse_verdict,
)
from vlmrlaif_jax.feedback.rankers import CompareFn, Comparison

LOWEST, HIGHEST = 1.0, 10.0  # Scores of a judge.
INCOMPLETE_REWARD = 0.0  # The score of a response without an end.

ScorePair: TypeAlias = tuple[float, float]  # Of A and of B.
WORDED_SCORES: dict[str | None, ScorePair | None] = {
  "A": (8.0, 4.0),
  "B": (4.0, 8.0),
  "tie": (6.0, 6.0),
  None: None,
}


def parse_scores(text: str) -> ScorePair | None:
  r"""The two numbers in the last \boxed{}; None unless it closes and holds just two.

  "\boxed{8, 6}" is (8, 6). Empty pieces do not count, and numbers are not bounded.
  """
  _, found, rest = text.rpartition(r"\boxed{")
  content = re.match(r"([^{}]*)\}", rest)  # A number has no braces in it.
  if not found or content is None:
    return None
  try:
    numbers = [float(piece) for piece in content[1].split(",") if piece.strip()]
  except ValueError:
    return None
  if len(numbers) != 2 or not all(map(math.isfinite, numbers)):
    return None
  return numbers[0], numbers[1]


def parse_worded_scores(text: str) -> ScorePair | None:
  """Scores for a verdict in words: "Output A is better because it is brief"."""
  return WORDED_SCORES[parse_verdict(text)]


class JudgeStyle(NamedTuple):
  """How a judge is asked, what it may be taught to say, and how it is read."""

  prompt: str  # With {question}, {a} and {b}.
  verdict: str  # With {better}, A or B, and {scores}: for want of words that say why.
  read: Callable[[str], ScorePair | None]


def make_worded_style(texts: prompts.Prompts) -> JudgeStyle:
  """A judge that is asked as for labels and says which answer is better."""
  return JudgeStyle(
    format_judge_prompt(texts, question="{question}", a="{a}", b="{b}"),
    prompts.BETTER_VERDICT.format("{better}", "more accurate"),
    parse_worded_scores,
  )


# Read from words: a model of very few parameters can use what it knows of judging, and
# has never had a number to say. With its output layer frozen it learns to begin a box,
# but not which number is in it.
BRIEF_STYLE = make_worded_style(prompts.BRIEF_PROMPTS)
# No principles are given on purpose: with its own, the judge does better on data unlike
# what it was taught on (table 3).
PAPER_STYLE = JudgeStyle(
  (
    "You are an expert at scoring. You are given a question about a video and two "
    "responses to it. First decide by which criteria responses to this very question "
    "are to be scored, and how much each one weighs. Then analyse both responses by "
    "them, step by step and as strictly as you can. Last, give each a whole number "
    "from 1 to 10: at 1 it meets no criterion, at 6 it meets some, at 10 it is "
    "perfect. The order in which they stand must not sway you.\n"
    "Question: {question}\nResponse A: {a}\nResponse B: {b}\n"
    "Answer in three parts:\n"
    "Specific Criteria: the criteria and their weights.\n"
    "Analysis: how the responses compare by each.\n"
    "Scores: those of responses A and B, in this order, as \\boxed{{s1, s2}}."
  ),
  (
    "Specific Criteria: accuracy (weight 10).\n"
    "Analysis: Response {better} is better because it is more accurate.\n"
    "Scores: \\boxed{{{scores}}}"
  ),
  parse_scores,
)
JUDGE_STYLES = {
  "brief": BRIEF_STYLE,
  "paper": PAPER_STYLE,
}  # By the same names as data/prompts.py.
SHOWN_SCORES = {1: "8, 4", 2: "4, 8"}  # By where the better answer stands.


def compute_verdict_reward(
  text: str, better: int, read: Callable[[str], ScorePair | None]
) -> float:
  """Returns 1 if a judge scores the better answer higher, else 0.

  Args:
    text: What the judge says. A tie, or no scores, has 0.
    better: Where the better answer stands, 1 or 2.
    read: Function of a Style.
  """
  scores = read(text)
  return float(scores is not None and scores[better - 1] > scores[2 - better])


def make_judge_examples(
  preferences: Sequence[PreferenceExample], style: JudgeStyle
) -> list[Example]:
  """Prompts to teach a judge by; truth["better"] is where the better answer stands.

  Where that is follows from the pair's id alone, for half of all ids each, whatever the
  order in the file; otherwise a judge could learn to favour a place.
  """
  examples: list[Example] = []
  for preference in preferences:
    better = 1 + hashlib.sha256(preference["id"].encode()).digest()[0] % 2
    # As responses are shown when a group is compared.
    chosen, rejected = map(join_lines, order_by_preference(preference))
    a, b = (chosen, rejected) if better == 1 else (rejected, chosen)
    turns = [text for turn in preference.get("history", []) for text in turn]
    asked = "\n".join([*turns, preference["question"]])
    prompt = style.prompt.format(question=asked, a=a, b=b)
    examples.append(
      {
        "id": preference["id"],
        "video": preference["video"],
        "question": prompt,
        "answer": "",
        "source": preference["source"],
        "turns": [(prompt, "")],
        "truth": {"better": better},
      }
    )
  return examples


def make_demonstrations(
  preferences: Sequence[PreferenceExample], style: JudgeStyle
) -> list[Example]:
  """The prompts of `judge_examples` with verdicts to imitate."""
  made: list[Example] = []
  for asked in make_judge_examples(preferences, style):
    better = asked["truth"]["better"]
    said = style.verdict.format(better="AB"[better - 1], scores=SHOWN_SCORES[better])
    made.append({**asked, "answer": said, "turns": [(asked["question"], said)]})
  return made


def compare_by_verdict(style: JudgeStyle) -> CompareFn:
  """A Compare by the rule: how judges answer `judge_examples`; see verdict_reward.

  Each response is a call of the judge that is taught.
  """

  def compare(examples, responses):
    rows = [
      [
        compute_verdict_reward(t or "", example["truth"]["better"], style.read)
        for t in texts
      ]
      for example, texts in zip(examples, responses, strict=True)
    ]
    scores = np.array(rows, float)
    unread = sum(style.read(text or "") is None for row in responses for text in row)
    return Comparison(scores, np.ones(scores.shape, bool), scores.size, unread)

  return compare


def compare_in_pairs(
  ask: AskFn,
  style: JudgeStyle,
  *,
  both_orders: bool = True,
  one_opponent: bool = False,
) -> CompareFn:
  """A Compare by a judge that scores the responses of a group two at a time.

  A response that is empty or was cut is not compared and has 0. Where what is left of a
  group says one thing only, the group is not valid. Responses that say the same are not
  compared with each other, and score alike; what is the same prompt is asked once.

  Args:
    ask: The judge.
    style: How it is asked and read.
    both_orders: n (n - 1) calls for n responses, as the paper writes; as its code does
      if False, half of them, with the one sampled first in the first place.
    one_opponent: Whether each response meets one other instead of all. Which one is
      drawn by the question and the responses; one of an odd number meets two.
  """

  def compare(examples, responses):
    said = [[join_lines(text) for text in texts] for texts in responses]
    shown = [[*dict.fromkeys(filter(None, texts))] for texts in said]
    queries = {
      (group, a, b): _query(example, texts[a], texts[b], style)
      for group, (example, texts) in enumerate(zip(examples, shown, strict=True))
      for a, b in _games(example, texts, both_orders, one_opponent)
    }
    replies = ask_unique(ask, list(queries.values()))
    verdicts = {
      key: None if reply is None else style.read(reply)
      for key, reply in replies.items()
    }
    own = [np.full((len(texts), len(texts), 2), np.nan) for texts in shown]
    for (group, a, b), query in queries.items():
      found = verdicts[make_query_key(query)]
      if found is not None:
        own[group][a, b, 0], own[group][b, a, 1] = np.clip(found, LOWEST, HIGHEST)
    groups = zip(own, shown, said, strict=True)
    scores = np.array([_scores(*group) for group in groups])
    unread = sum(found is None for found in verdicts.values())
    return Comparison(scores, np.isfinite(scores), len(verdicts), unread)

  return compare


def average_pair_scores(
  games: Float[np.ndarray, "group group 2"],
) -> Float[np.ndarray, " group"]:
  """Averages each response's scores over opponents and orders (2505.18531).

  S(y_i) = 1 / (2 (k - 1)) sum_{j != i} [s(y_i | y_i, y_j) + s(y_i | y_j, y_i)]

  Comparisons that are missing do not count.

  Args:
    games: games[i, j, o] is the score of response i next to j, with i in the first
      place (o = 0) or the second (o = 1). NaN if there is none.

  Returns:
    A score for each response; NaN without any comparison.
  """
  counts = np.isfinite(games).sum(axis=(1, 2))
  return np.nansum(games, axis=(1, 2)) / np.where(counts, counts, np.nan)


def _games(
  example: Example, texts: Sequence[str], both_orders: bool, one_opponent: bool
) -> list[tuple[int, int]]:
  """Returns who is compared with whom: (first, second), as they are shown."""
  count = len(texts)
  games = list(itertools.combinations(range(count), 2))
  if one_opponent and count > 2:
    drawn = zlib.crc32("\0".join([example["id"], *texts]).encode())
    places = np.random.default_rng(drawn).permutation(count).tolist()
    half = count // 2
    met = [(places[i], places[(i + half) % count]) for i in range((count + 1) // 2)]
    games = [(min(pair), max(pair)) for pair in met]
  return games + [(b, a) for a, b in games] if both_orders else games


def _query(example: Example, a: str, b: str, style: JudgeStyle) -> JudgeQuery:
  prompt = style.prompt.format(question=example["question"], a=a, b=b)
  drawn = zlib.crc32(prompt.encode())  # What is sampled depends on the id.
  return JudgeQuery(f"grm:{drawn:08x}:{example['id']}", example["video"], prompt)


def _scores(
  own: Float[np.ndarray, "group group 2"],
  shown: Sequence[str],
  said: Sequence[str],
) -> np.ndarray:
  """The score of each response, from the comparisons of all different ones."""
  if len(shown) == 1:  # There is nothing to compare it with, not even what was cut.
    return np.full(len(said), np.nan)
  at = [shown.index(text) for text in said if text]
  games = own[np.ix_(at, at)]  # So that what is said twice counts twice to others.
  scores = np.full(len(said), INCOMPLETE_REWARD)
  scores[[bool(text) for text in said]] = average_pair_scores(games)
  return scores
