r"""Scores groups of responses with a generative reward model.

Generative RLHF-V (2505.18531): the judge writes criteria and an analysis, then scores
two answers. RL trains it on preferences: the reward is 1 if the better answer has the
higher score. `compare_in_pairs` scores a group by comparisons within it. Comparisons
that cannot be parsed are dropped. A response without comparisons is not valid.
"""

import hashlib
import itertools
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
)
from vlmrlaif_jax.feedback.rankers import CompareFn, Comparison
from vlmrlaif_jax.feedback.replies.scores import parse_boxed_scores
from vlmrlaif_jax.feedback.replies.verdicts import parse_verdict

LOWEST, HIGHEST = 1.0, 10.0  # Range of a judge's scores.
INCOMPLETE_REWARD = 0.0  # Score of a truncated or empty response.

ScorePair: TypeAlias = tuple[float, float]  # Scores of A and of B.
WORDED_SCORES: dict[str | None, ScorePair | None] = {
  "A": (8.0, 4.0),
  "B": (4.0, 8.0),
  "tie": (6.0, 6.0),
  None: None,
}


def parse_scores(text: str) -> ScorePair | None:
  r"""Returns the two scores in the last \boxed{}, see `parse_boxed_scores`."""
  scores = parse_boxed_scores(text)
  return (scores[0], scores[1]) if scores else None


def parse_worded_scores(text: str) -> ScorePair | None:
  """Returns scores for a verdict: "Output A is better because it is brief"."""
  return WORDED_SCORES[parse_verdict(text)]


class JudgeStyle(NamedTuple):
  """The prompt, demonstration and parser of a judge."""

  prompt: str  # Has {question}, {a} and {b}.
  verdict: str  # Reply of demonstrations; has {better}, A or B, and {scores}.
  read: Callable[[str], ScorePair | None]  # Parses a reply; None: not parsable.


def make_worded_style(texts: prompts.Prompts) -> JudgeStyle:
  """Returns the style of pairwise labels, whose replies name the better answer."""
  return JudgeStyle(
    format_judge_prompt(texts, question="{question}", a="{a}", b="{b}"),
    prompts.BETTER_VERDICT.format("{better}", "more accurate"),
    parse_worded_scores,
  )


# Verdicts are words, because a tiny model has learned verdicts but no numbers. With a
# frozen output layer, it learns to open a box, but not the number in it.
BRIEF_STYLE = make_worded_style(prompts.BRIEF_PROMPTS)
# The prompt has no principles: the judge generalizes better with its own (table 3).
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
# Names as in data/prompts.py -> style.
JUDGE_STYLES = {"brief": BRIEF_STYLE, "paper": PAPER_STYLE}
# Position of the better answer -> scores in a demonstration.
DEMONSTRATION_SCORES = {1: "8, 4", 2: "4, 8"}


def compute_verdict_reward(
  text: str, better: int, read: Callable[[str], ScorePair | None]
) -> float:
  """Returns 1 if a judge scores the better answer higher, else 0.

  Args:
    text: Reply of the judge. A tie or a reply without scores has reward 0.
    better: Position of the better answer, 1 or 2.
    read: Parser of a JudgeStyle.
  """
  scores = read(text)
  return float(scores is not None and scores[better - 1] > scores[2 - better])


def make_judge_examples(
  preferences: Sequence[PreferenceExample], style: JudgeStyle
) -> list[Example]:
  """Makes prompts that train a judge; truth["better"] is the better answer's position.

  A hash of the pair's id sets the position, so each position has half of the pairs.
  Otherwise, a judge could learn to prefer a position.
  """
  examples: list[Example] = []
  for preference in preferences:
    better = 1 + hashlib.sha256(preference["id"].encode()).digest()[0] % 2
    # compare_in_pairs joins the lines of responses too.
    chosen, rejected = map(join_lines, order_by_preference(preference))
    a, b = (chosen, rejected) if better == 1 else (rejected, chosen)
    prompt = style.prompt.format(question=join_history(preference), a=a, b=b)
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


def join_history(preference: PreferenceExample) -> str:
  """Returns the question of a preference after its earlier turns, each on a line."""
  turns = [text for turn in preference.get("history", []) for text in turn]
  return "\n".join([*turns, preference["question"]])


def make_demonstrations(
  preferences: Sequence[PreferenceExample], style: JudgeStyle
) -> list[Example]:
  """Returns the prompts of `make_judge_examples` with verdicts for SFT."""
  examples: list[Example] = []
  for example in make_judge_examples(preferences, style):
    better = example["truth"]["better"]
    verdict = style.verdict.format(
      better="AB"[better - 1], scores=DEMONSTRATION_SCORES[better]
    )
    turns = [(example["question"], verdict)]
    examples.append({**example, "answer": verdict, "turns": turns})
  return examples


def compare_by_verdict(style: JudgeStyle) -> CompareFn:
  """Returns a CompareFn that scores replies of a judge to `make_judge_examples`.

  The score is compute_verdict_reward. Each response counts as a call of the judge.
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
  """Returns a CompareFn whose judge scores the responses of a group in pairs.

  Empty and truncated responses are not compared and score INCOMPLETE_REWARD. A group is
  not valid if only one distinct response remains. Equal responses are not compared with
  each other and have the same score. Equal prompts are sent once.

  Args:
    ask: The judge.
    style: Prompt and parser of the judge.
    both_orders: Whether each pair is judged in both orders, n (n - 1) calls for n
      responses, as in the paper. If False, half of them as in the paper's code, with
      the earlier sample in the first position.
    one_opponent: Whether each response is compared with one other instead of all. The
      question and the responses seed the choice. In an odd group, one response has two
      opponents.
  """

  def compare(examples, responses):
    joined = [[join_lines(text) for text in texts] for texts in responses]
    distinct = [[*dict.fromkeys(filter(None, texts))] for texts in joined]
    queries = {
      (group, a, b): _make_query(example, texts[a], texts[b], style)
      for group, (example, texts) in enumerate(zip(examples, distinct, strict=True))
      for a, b in _pick_comparisons(example, texts, both_orders, one_opponent)
    }
    replies = ask_unique(ask, list(queries.values()))
    verdicts = {
      key: None if reply is None else style.read(reply)
      for key, reply in replies.items()
    }
    tables = [np.full((len(texts), len(texts), 2), np.nan) for texts in distinct]
    for (group, a, b), query in queries.items():
      pair = verdicts[make_query_key(query)]
      if pair is not None:
        table = tables[group]
        table[a, b, 0], table[b, a, 1] = np.clip(pair, LOWEST, HIGHEST)
    groups = zip(tables, distinct, joined, strict=True)
    scores = np.array([_score_group(*group) for group in groups])
    unread = sum(pair is None for pair in verdicts.values())
    return Comparison(scores, np.isfinite(scores), len(verdicts), unread)

  return compare


def average_pair_scores(
  pair_scores: Float[np.ndarray, "group group 2"],
) -> Float[np.ndarray, " group"]:
  """Averages each response's scores over opponents and orders (2505.18531).

  S(y_i) = 1 / (2 (k - 1)) sum_{j != i} [s(y_i | y_i, y_j) + s(y_i | y_j, y_i)]

  The mean excludes missing comparisons.

  Args:
    pair_scores: pair_scores[i, j, o] is the score of response i compared with j. The
      position of i is the first (o = 0) or the second (o = 1). NaN if missing.

  Returns:
    The score of each response; NaN without comparisons.
  """
  counts = np.isfinite(pair_scores).sum(axis=(1, 2))
  return np.nansum(pair_scores, axis=(1, 2)) / np.where(counts, counts, np.nan)


def _pick_comparisons(
  example: Example, texts: Sequence[str], both_orders: bool, one_opponent: bool
) -> list[tuple[int, int]]:
  """Returns the pairs to compare, as indices of the first and the second answer."""
  count = len(texts)
  pairs = list(itertools.combinations(range(count), 2))
  if one_opponent and count > 2:
    seed = zlib.crc32("\0".join([example["id"], *texts]).encode())
    ring = np.random.default_rng(seed).permutation(count).tolist()
    half = count // 2
    opposite = [(ring[i], ring[(i + half) % count]) for i in range((count + 1) // 2)]
    pairs = [(min(pair), max(pair)) for pair in opposite]
  return pairs + [(b, a) for a, b in pairs] if both_orders else pairs


def _make_query(example: Example, a: str, b: str, style: JudgeStyle) -> JudgeQuery:
  prompt = style.prompt.format(question=example["question"], a=a, b=b)
  digest = zlib.crc32(prompt.encode())  # The id seeds the sampling of the reply.
  return JudgeQuery(f"grm:{digest:08x}:{example['id']}", example["video"], prompt)


def _score_group(
  table: Float[np.ndarray, "group group 2"],
  distinct: Sequence[str],
  responses: Sequence[str],
) -> np.ndarray:
  """Computes the score of each response from the pair scores of the distinct ones."""
  if len(distinct) == 1:  # Without comparisons, all responses are invalid.
    return np.full(len(responses), np.nan)
  indices = [distinct.index(text) for text in responses if text]
  # A repeated response counts as an opponent as often as it occurs.
  pair_scores = table[np.ix_(indices, indices)]
  scores = np.full(len(responses), INCOMPLETE_REWARD)
  scores[[bool(text) for text in responses]] = average_pair_scores(pair_scores)
  return scores
