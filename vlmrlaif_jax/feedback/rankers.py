"""The order of a group of responses: by scores, by one list, by pairs.

An oracle in the sense of Oracle-RLAIF (2510.02561): it says who is better, not by how
much. Whatever it is, it is a `Rank`. What it cannot tell is not valid; nothing is
filled in for it.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from vlmrlaif_jax.data.prompts import Prompts
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.pairwise_judge import Pair, Query, judge_pairs

LIST_PROMPT = (
  "You are given a question about a video and {count} responses to it. Rank them by "
  "these measures. Accurate: what it says is borne out by the video. Helpful: it gives "
  "what the question calls for. Natural: it reads well. Concise: it is brief and "
  "clear. The order in which they stand must not sway you.\n"
  "Question: {question}\n{responses}\n"
  "Answer with nothing but a list of the {count} numbers, from the best response to "
  "the worst, such as {example}."
)


class Ranking(NamedTuple):
  """The ranks within each group."""

  ranks: Int[np.ndarray, "prompts group"]  # 0 for the best; ties alike, as 0, 0, 2.
  valid: Bool[np.ndarray, " prompts"]  # False where the oracle failed.


# (questions, the responses to each) -> their ranks. Groups are of one size.
Rank: TypeAlias = Callable[[Sequence[Example], Sequence[Sequence[str]]], Ranking]
# What a judge says to each query; None if it could not be asked, or gave no answer.
Ask: TypeAlias = Callable[[Sequence[Query]], Sequence[str | None]]


def ranks_of(
  scores: Float[np.ndarray, "*batch group"],
) -> Int[np.ndarray, "*batch group"]:
  """Ranks from scores: how many of the group are higher."""
  return np.sum(scores[..., None, :] > scores[..., :, None], axis=-1)


def parse_order(text: str, count: int) -> list[int] | None:
  """The ranks that a list of numbers, from best to worst, gives to 1..count.

  "[3, 1, 2]" puts the third first: ranks 1, 2, 0. None unless what stands between the
  first [ and the last ] is each number once, and nothing else.
  """
  found = re.search(r"\[(.*)\]", text, re.DOTALL)
  if found is None or not re.fullmatch(r"[0-9]+(\s*,\s*[0-9]+)*", found[1].strip()):
    return None
  order = [int(number) for number in found[1].split(",")]
  if sorted(order) != list(range(1, count + 1)):
    return None
  return [order.index(number) for number in range(1, count + 1)]


def by_scores(score: Callable[[Sequence[Example], Sequence[str]], np.ndarray]) -> Rank:
  """An oracle that sorts by a score of each response alone, such as a reward model's.

  Responses that say the same rank alike.

  Args:
    score: of each text as the response to each question; NaN if it has none.
  """

  def rank(examples, responses):
    flat = [(e, t) for e, texts in zip(examples, responses, strict=True) for t in texts]
    scores = np.asarray(score([e for e, _ in flat], [t for _, t in flat]))
    said = [[_said(text) for text in texts] for texts in responses]
    return _ranking(responses, said, list(scores.reshape(len(examples), -1)))

  return rank


def by_truth(mistakes: Callable[[Example, str], int | None]) -> Rank:
  """An oracle that knows the truth: the fewer mistakes, the better.

  Args:
    mistakes: that a response makes; None where the truth is not known.
  """

  def score(examples, texts):
    counts = [mistakes(e, t) for e, t in zip(examples, texts, strict=True)]
    return np.array([np.nan if count is None else -count for count in counts], float)

  return by_scores(score)


def by_list(ask: Ask) -> Rank:
  """An oracle that is shown a whole group and lists it from best to worst.

  Responses that say the same are shown once, and rank alike.
  """

  def rank(examples, responses):
    shown = [_distinct(texts) for texts in responses]
    asked = [i for i, texts in enumerate(shown) if len(texts) > 1]
    replies = ask([_list_query(examples[i], shown[i]) for i in asked])
    orders = {i: [0] for i in range(len(shown))}  # What is alone is first.
    for i, reply in zip(asked, replies, strict=True):
      orders[i] = None if reply is None else parse_order(reply, len(shown[i]))
    scores = [_or_nan(orders[i], len(shown[i])) for i in range(len(shown))]
    return _ranking(responses, shown, scores)

  return rank


def by_wins(ask: Ask, prompts: Prompts) -> Rank:
  """An oracle that compares every two of a group, in both orders, and counts wins.

  A tie, or two verdicts that contradict each other, is half a win for both. A pair of
  which a verdict cannot be told makes its group invalid. Beside a response, an empty
  one loses.

  Args:
    prompts: hold the rules of the judge.
  """

  def rank(examples, responses):
    shown = [_distinct(texts) for texts in responses]
    places = [
      (i, a, b)
      for i, texts in enumerate(shown)
      for a, b in itertools.combinations(range(len(texts)), 2)
    ]
    pairs = [_pair(examples[i], shown[i], a, b) for i, a, b in places]
    scores = [np.zeros(len(texts)) for texts in shown]
    judged = zip(places, judge_pairs(pairs, ask, prompts), strict=True)
    for (i, a, b), judgement in judged:
      won = _win(judgement.outcome, shown[i][a])
      scores[i][[a, b]] += np.array([won, 1 - won])
    return _ranking(responses, shown, scores)

  return rank


def shuffled(rank: Rank, *, share: float, seed: int) -> Rank:
  """An oracle that errs: a share of the responses have their ranks shuffled.

  Which ones, and how, depends on the question and the responses alone.

  Args:
    share: of the responses; the ranks of those drawn in a group go round among them.
  """

  def noisy(examples, responses):
    ranks, valid = rank(examples, responses)
    made = ranks.copy()
    for row, example, texts in zip(made, examples, responses, strict=True):
      said = zlib.crc32("\0".join([example["id"], *texts]).encode())
      rng = np.random.default_rng([seed, said])
      drawn = np.flatnonzero(rng.random(len(row)) < share)
      row[drawn] = rng.permutation(row[drawn])
    return Ranking(made, valid)

  return noisy


def as_score(
  rank: Rank,
  examples: Sequence[Example],
  read: Callable[[np.ndarray, np.ndarray], Sequence[str]],
) -> Callable[[Any, Any], tuple[Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]]:
  """A scorer for Parts.score: minus the rank; a group that failed is invalid whole.

  It runs on the host, outside jit, and reads frozen["asked"]: the numbers of the
  examples that the prompts of the batch are, once each.

  Args:
    read: the responses' texts, from tokens and loss_mask.
  """

  def score(frozen, batch):
    asked = [examples[i] for i in np.asarray(frozen["asked"])]
    texts = list(read(np.asarray(batch.tokens), np.asarray(batch.loss_mask)))
    found = rank(asked, grouped(texts, len(asked)))
    size = found.ranks.shape[1]
    return -found.ranks.reshape(-1).astype(np.float32), np.repeat(found.valid, size)

  return score


def grouped(texts: Sequence[Any], count: int) -> list[Sequence[Any]]:
  """The responses to each of `count` prompts, which stand together."""
  size = len(texts) // count
  return [texts[i * size : (i + 1) * size] for i in range(count)]


def _said(text: str) -> str:
  """The text, whatever its white space."""
  return " ".join(text.split())


def _distinct(texts: Sequence[str]) -> list[str]:
  """What is said, once each."""
  return list(dict.fromkeys(map(_said, texts)))


def _ranking(
  responses: Sequence[Sequence[str]],
  shown: Sequence[Sequence[str]],
  scores: Sequence[np.ndarray],
) -> Ranking:
  """Each response ranked by the score of what it says; NaN is for no score."""
  rows = []
  for texts, said, of_said in zip(responses, shown, scores, strict=True):
    known = dict(zip(said, of_said, strict=True))
    rows.append([known[_said(text)] for text in texts])
  table = np.array(rows, float)
  return Ranking(ranks_of(table), np.all(np.isfinite(table), axis=1))


def _or_nan(ranks: list[int] | None, count: int) -> np.ndarray:
  return np.full(count, np.nan) if ranks is None else -np.array(ranks, float)


def _list_query(example: Example, texts: Sequence[str]) -> Query:
  count = len(texts)
  prompt = LIST_PROMPT.format(
    count=count,
    question=example["question"],
    responses="\n".join(f"[{n}] {text}" for n, text in enumerate(texts, 1)),
    example=[*range(2, count + 1), 1],
  )
  return Query(f"list:{example['id']}", example["video"], prompt)


def _pair(example: Example, texts: Sequence[str], a: int, b: int) -> Pair:
  id = f"{a}-{b}:{example['id']}"
  return Pair(id, example["video"], example["question"], texts[a], texts[b])


def _win(outcome, first: str) -> float:
  """How much of the pair the first one wins; NaN if that cannot be told."""
  if outcome.preference is not None:
    return 1.0 if outcome.preference == 1 else 0.0
  if outcome.name == "empty":
    return 1.0 if first else 0.0
  return 0.5 if outcome.name in ("tie", "order_inconsistent") else np.nan
