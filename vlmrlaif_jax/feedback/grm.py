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
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from vlmrlaif_jax.data.records import Example, PreferenceExample, chosen_and_rejected
from vlmrlaif_jax.feedback.judge import Query
from vlmrlaif_jax.feedback.rank import Ask, grouped

LOWEST, HIGHEST = 1.0, 10.0  # Scores of a judge.
INCOMPLETE = 0.0  # The score of a response without an end.

# No principles are given on purpose: with its own, the judge does better on data unlike
# what it was taught on (table 3).
BRIEF = (
  "Score two outputs from 1 to 10: criteria, analysis, then the scores of A and B as "
  "\\boxed{{8, 6}}. Question: {question} Output A: {a} Output B: {b}"
)
PAPER = (
  "You are an expert at scoring. You are given a question about a video and two "
  "responses to it. First decide by which criteria responses to this very question "
  "are to be scored, and how much each one weighs. Then analyse both responses by "
  "them, step by step and as strictly as you can. Last, give each a whole number from "
  "1 to 10: at 1 it meets no criterion, at 6 it meets some, at 10 it is perfect. The "
  "order in which they stand must not sway you.\n"
  "Question: {question}\nResponse 1: {a}\nResponse 2: {b}\n"
  "Answer in three parts:\n"
  "Specific Criteria: the criteria and their weights.\n"
  "Analysis: how the responses compare by each.\n"
  "Scores: those of responses 1 and 2, in this order, as \\boxed{{s1, s2}}."
)
STYLES = {"brief": BRIEF, "paper": PAPER}  # By the same names as data/prompts.py.


class Comparison(NamedTuple):
  """The scores of the responses of each group."""

  scores: Float[np.ndarray, "prompts group"]  # NaN for none.
  valid: Bool[np.ndarray, "prompts group"]  # False where there is none.
  calls: int  # Of the judge.
  unread: int  # Of those, how many had no reply, or none that could be read.


# (questions, the responses to each) -> their scores. Groups are of one size. None is a
# response that was cut before its end.
Compare: TypeAlias = Callable[
  [Sequence[Example], Sequence[Sequence[str | None]]], Comparison
]
# What two answers were given: own[i, j, o] is what i got beside j, where it stood first
# (o = 0) or second (o = 1); NaN if that was not asked, or not read.
Games: TypeAlias = Float[np.ndarray, "group group 2"]


def parse_scores(text: str) -> tuple[float, float] | None:
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


def verdict_reward(text: str, better: int) -> float:
  """1 if the judge scores the better answer higher, else 0: also a tie, or no scores.

  Args:
    better: where the better answer stands, 1 or 2.
  """
  scores = parse_scores(text)
  if scores is None:
    return 0.0
  return float(scores[better - 1] > scores[2 - better])


def judge_examples(
  preferences: Sequence[PreferenceExample], template: str
) -> list[Example]:
  """Prompts to teach a judge by; truth["better"] is where the better answer stands.

  Where that is follows from the pair's id alone, for half of all ids each, whatever the
  order in the file; otherwise a judge could learn to favour a place.

  Args:
    template: of STYLES.
  """
  return [_judge_example(preference, template) for preference in preferences]


def by_verdict(
  examples: Sequence[Example], responses: Sequence[Sequence[str | None]]
) -> Comparison:
  """A Compare by the rule: how judges answer `judge_examples`; see verdict_reward."""
  rows = [
    [verdict_reward(text or "", example["truth"]["better"]) for text in texts]
    for example, texts in zip(examples, responses, strict=True)
  ]
  scores = np.array(rows, float)
  return Comparison(scores, np.ones(scores.shape, bool), calls=0, unread=0)


def mean_scores(own: Games) -> Float[np.ndarray, " group"]:
  """The mean of what each was given; the paper's S, of both orders and all others.

  S(y_i) = 1 / (2 (k - 1)) sum_{j != i} [s(y_i | y_i, y_j) + s(y_i | y_j, y_i)]
  """
  return _mean(own, (1, 2))


def borda_scores(own: Games) -> Float[np.ndarray, " group"]:
  """The share of its comparisons that each wins; a tie is half a win."""
  other = _other(own)
  wins = np.where(np.isfinite(own), (own > other) + 0.5 * (own == other), np.nan)
  return _scaled(_mean(wins, (1, 2)))


def ranked_pairs_scores(own: Games) -> Float[np.ndarray, " group"]:
  """Places by Tideman's ranked pairs: the clearest wins hold, what contradicts falls.

  Wins of one strength are taken together, and those of them that close a circle fall
  together, so that the order of the responses makes no difference.
  """
  margins = _margins(own)
  held = np.zeros(margins.shape, bool)
  for strength in np.unique(margins[margins > 0])[::-1]:
    level = margins == strength
    held |= level & ~_reach(held | level).T
  return _by_place(_reach(held))


def irv_scores(own: Games) -> Float[np.ndarray, " group"]:
  """Places by instant runoff: by turns, the one that fewest put first drops out.

  The paper does not say who votes. Here each response does: it puts the others in the
  order of their margins beside it, and itself where it would be level. A vote is shared
  among equals. Of those who have the fewest, the least ahead of who is left drops out.
  """
  margins = _margins(own)
  np.fill_diagonal(margins, 0.0)
  ballots = np.nan_to_num(margins, nan=-np.inf)
  left, turns = np.ones(len(own), bool), np.zeros(len(own), int)
  while left.any():
    standing = np.where(left[:, None], ballots, -np.inf)
    first = np.isfinite(standing) & (standing == standing.max(axis=0))
    votes = np.sum(first / np.maximum(first.sum(axis=0), 1), axis=1)
    fewest = left & (votes < votes[left].min() + 1e-6)  # Thirds are not exact.
    ahead = np.nansum(margins[:, left], axis=1)
    turns[left] += 1
    left &= ~(fewest & (ahead < ahead[fewest].min() + 1e-6))
  return _by_place(turns[:, None] > turns)


def spectral_scores(own: Games) -> Float[np.ndarray, " group"]:
  """The long run of a walk that goes from i to j by j's share of their points.

  Rank Centrality (1209.1688) with shares of points for shares of wins: none is 0.
  """
  other = _other(own)
  steps = np.nan_to_num(_mean(other / (own + other), 2)) / (len(own) - 1)
  steps += np.diag(1 - steps.sum(axis=1))
  # A power rather than an eigenvector: also where not all are linked by comparisons.
  run = np.linalg.matrix_power(steps, 2**20)
  return _scaled(run.mean(axis=0))


# All are from 1 to 10, so above what is incomplete.
AGGREGATES: dict[str, Callable[[Games], Float[np.ndarray, " group"]]] = {
  "mean": mean_scores,
  "borda": borda_scores,
  "ranked_pairs": ranked_pairs_scores,
  "irv": irv_scores,
  "spectral": spectral_scores,
}


def by_comparison(
  ask: Ask,
  template: str,
  *,
  aggregate: str = "mean",
  both_orders: bool = True,
  opponents: int = 0,
) -> Compare:
  """A Compare by a judge that scores the responses of a group two at a time.

  A response that is empty or was cut is not compared and has 0. Where what is left of a
  group says one thing only, the group is not valid. Responses that say the same are not
  compared with each other, and score alike; what is the same prompt is asked once.

  Args:
    template: of STYLES.
    aggregate: a key of AGGREGATES.
    both_orders: n (n - 1) calls for n responses, as the paper writes; as its code does
      if False, half of them, with the one sampled first in the first place.
    opponents: that each response meets, drawn by the question and the responses; one
      of them may meet one more. 0 for all others.
  """
  if aggregate not in AGGREGATES:
    raise ValueError(f"aggregate must be one of {list(AGGREGATES)}, not {aggregate!r}")
  if opponents < 0:
    raise ValueError(f"opponents must be 0, for all others, or more, not {opponents}")

  def compare(examples, responses):
    said = [[_said(text) for text in texts] for texts in responses]
    shown = [[*dict.fromkeys(filter(None, texts))] for texts in said]
    queries = {
      (group, a, b): _query(example, texts[a], texts[b], template)
      for group, (example, texts) in enumerate(zip(examples, shown, strict=True))
      for a, b in _games(example, texts, both_orders, opponents)
    }
    verdicts = _ask_once(ask, list(queries.values()))
    own = [np.full((len(texts), len(texts), 2), np.nan) for texts in shown]
    for (group, a, b), query in queries.items():
      found = verdicts[_key(query)]
      if found is not None:
        own[group][a, b, 0], own[group][b, a, 1] = np.clip(found, LOWEST, HIGHEST)
    groups = zip(own, shown, said, strict=True)
    scores = np.array([_scores(AGGREGATES[aggregate], *group) for group in groups])
    unread = sum(found is None for found in verdicts.values())
    return Comparison(scores, np.isfinite(scores), len(verdicts), unread)

  return compare


def as_score(
  compare: Compare,
  examples: Sequence[Example],
  read: Callable[[np.ndarray, np.ndarray], Sequence[str]],
  *,
  eos: int,
) -> Callable[[Any, Any], tuple[Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]]:
  """A scorer for Parts.score, on the host; it reads frozen["asked"] as rank.as_score.

  Args:
    read: the responses' texts, from tokens and loss_mask.
    eos: what a response that was not cut ends in.
  """

  def score(frozen, batch):
    asked = [examples[i] for i in np.asarray(frozen["asked"])]
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.loss_mask)
    ended = np.any((tokens == eos) & mask, axis=1)
    rows = zip(read(tokens, mask), ended, strict=True)
    texts = [text if whole else None for text, whole in rows]
    found = compare(asked, grouped(texts, len(asked)))
    return found.scores.reshape(-1).astype(np.float32), found.valid.reshape(-1)

  return score


def _judge_example(preference: PreferenceExample, template: str) -> Example:
  better = 1 + hashlib.sha256(preference["id"].encode()).digest()[0] % 2
  # As responses are shown when a group is compared.
  chosen, rejected = map(_said, chosen_and_rejected(preference))
  a, b = (chosen, rejected) if better == 1 else (rejected, chosen)
  turns = [text for turn in preference.get("history", []) for text in turn]
  asked = "\n".join([*turns, preference["question"]])
  prompt = template.format(question=asked, a=a, b=b)
  return {
    "id": preference["id"],
    "video": preference["video"],
    "question": prompt,
    "answer": "",
    "source": preference["source"],
    "turns": [(prompt, "")],
    "truth": {"better": better},
  }


def _said(text: str | None) -> str:
  """The text, whatever its white space; "" if it was cut."""
  return " ".join(text.split()) if text else ""


def _games(
  example: Example, texts: Sequence[str], both_orders: bool, opponents: int
) -> list[tuple[int, int]]:
  """Who is compared with whom: (first, second), as they are shown."""
  count = len(texts)
  games = list(itertools.combinations(range(count), 2))
  if 0 < opponents < count - 1:
    # Around a circle of all in random order: one's nearest on both sides and, if an odd
    # one is wanted, the one across.
    drawn = zlib.crc32("\0".join([example["id"], *texts]).encode())
    places = np.random.default_rng(drawn).permutation(count).tolist()
    steps = range(1, opponents // 2 + 1)
    across = range((count + 1) // 2 if opponents % 2 else 0)
    ring = [(i, i + step) for step in steps for i in range(count)]
    ring += [(i, i + count // 2) for i in across]
    games = [tuple(sorted((places[i], places[j % count]))) for i, j in ring]
  return games + [(b, a) for a, b in games] if both_orders else games


def _query(example: Example, a: str, b: str, template: str) -> Query:
  prompt = template.format(question=example["question"], a=a, b=b)
  drawn = zlib.crc32(prompt.encode())  # What is sampled depends on the id.
  return Query(f"grm:{drawn:08x}:{example['id']}", example["video"], prompt)


def _key(query: Query) -> tuple[str, str]:
  """What makes two queries the same."""
  return str(query.video), query.prompt


def _ask_once(
  ask: Ask, queries: Sequence[Query]
) -> dict[tuple[str, str], tuple[float, float] | None]:
  """The scores that the judge gives to each query, by what makes it the same."""
  once = {_key(query): query for query in queries}
  replies = ask(list(once.values()))
  return {
    key: None if reply is None else parse_scores(reply)
    for key, reply in zip(once, replies, strict=True)
  }


def _scores(
  aggregate: Callable[[Games], np.ndarray],
  own: Games,
  shown: Sequence[str],
  said: Sequence[str],
) -> np.ndarray:
  """The score of each response, from the comparisons of all different ones."""
  if len(shown) == 1:  # There is nothing to compare it with, not even what was cut.
    return np.full(len(said), np.nan)
  at = [shown.index(text) for text in said if text]
  games = own[np.ix_(at, at)]  # So that what is said twice counts twice to others.
  found = np.full(len(at), np.nan)
  compared = np.isfinite(games).any(axis=(1, 2))
  if compared.any():
    found[compared] = aggregate(games[np.ix_(compared, compared)])
  scores = np.full(len(said), INCOMPLETE)
  scores[[bool(text) for text in said]] = found
  return scores


def _mean(x: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
  """The mean of what is not NaN; NaN if all is."""
  count = np.sum(np.isfinite(x), axis=axis)
  return np.nansum(x, axis=axis) / np.where(count, count, np.nan)


def _other(own: Games) -> Games:
  """What j got where i got own[i, j, o]."""
  return own.transpose(1, 0, 2)[..., ::-1]


def _margins(own: Games) -> Float[np.ndarray, "group group"]:
  """By how much i is above j, over both orders; rounded, so that equals are equal."""
  return np.round(_mean(own - _other(own), 2), 9)


def _reach(beats: Bool[np.ndarray, "group group"]) -> Bool[np.ndarray, "group group"]:
  """Whether a chain of wins leads from i to j."""
  chain = beats.copy()
  for k in range(len(chain)):
    chain |= np.outer(chain[:, k], chain[k])
  return chain


def _by_place(above: Bool[np.ndarray, "group group"]) -> Float[np.ndarray, " group"]:
  """From the lowest score to the highest in even steps; equals share theirs."""
  lead = above.sum(axis=1) - above.sum(axis=0)
  return _scaled((1 + lead / (len(above) - 1)) / 2)


def _scaled(share: np.ndarray) -> np.ndarray:
  """From 0..1 to the range of scores."""
  return LOWEST + (HIGHEST - LOWEST) * share
