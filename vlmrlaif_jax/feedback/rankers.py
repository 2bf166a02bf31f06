"""The order of a group of responses: by scores, by one list, by pairs.

An oracle in the sense of Oracle-RLAIF (2510.02561): it says who is better, not by how
much: its scores are minus the ranks. Whatever scores a group is a `Compare`. What it
cannot tell is not valid; nothing is filled in for it.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.data.prompts import Prompts
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.pairwise_judge import (
  AnswerPair,
  AskFn,
  JudgeQuery,
  compute_win,
  join_lines,
  judge_pairs,
)

LIST_PROMPT = (
  "You are given a question about a video and {count} responses to it. Rank them by "
  "these measures. Accurate: what it says is borne out by the video. Helpful: it gives "
  "what the question calls for. Natural: it reads well. Concise: it is brief and "
  "clear. The order in which they stand must not sway you.\n"
  "Question: {question}\n{responses}\n"
  "Answer with nothing but a list of the {count} numbers, from the best response to "
  "the worst, such as {example}."
)


class Comparison(NamedTuple):
  """The scores of the responses of each group."""

  scores: Float[np.ndarray, "prompts group"]  # What is not valid has any, or NaN.
  valid: Bool[np.ndarray, "prompts group"]  # False where there is none.
  calls: int = 0  # Number of queries to a judge.
  unread: int = 0  # Number of queries without a reply, or with one that is not read.


# (questions, the responses to each) -> their scores. Groups are of one size. None is a
# response that was cut before its end; oracles that rank are given none.
CompareFn: TypeAlias = Callable[
  [Sequence[Example], Sequence[Sequence[str | None]]], Comparison
]


def compute_ranks(
  scores: Float[np.ndarray, "*batch group"],
) -> Int[np.ndarray, "*batch group"]:
  """Ranks from scores: how many of the group are higher. Ties are alike, as 0, 0, 2."""
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


def score_ranker(
  score: Callable[[Sequence[Example], Sequence[str]], np.ndarray],
) -> CompareFn:
  """An oracle that sorts by a score of each response alone, such as a reward model's.

  Responses that say the same rank alike.

  Args:
    score: of each text as the response to each question; NaN if it has none.
  """

  def rank(examples, responses):
    flat = [(e, t) for e, texts in zip(examples, responses, strict=True) for t in texts]
    scores = np.asarray(score([e for e, _ in flat], [t for _, t in flat]))
    said = [[join_lines(text) for text in texts] for texts in responses]
    return _ranking(responses, said, list(scores.reshape(len(examples), -1)))

  return rank


def truth_ranker(mistakes: Callable[[Example, str], int | None]) -> CompareFn:
  """An oracle that knows the truth: the fewer mistakes, the better.

  Args:
    mistakes: that a response makes; None where the truth is not known.
  """

  def score(examples, texts):
    counts = [mistakes(e, t) for e, t in zip(examples, texts, strict=True)]
    return np.array([np.nan if count is None else -count for count in counts], float)

  return score_ranker(score)


def listwise_ranker(ask: AskFn) -> CompareFn:
  """An oracle that is shown a whole group and lists it from best to worst.

  Responses that say the same are shown once, and rank alike.
  """

  def rank(examples, responses):
    shown = [_distinct(texts) for texts in responses]
    asked = [i for i, texts in enumerate(shown) if len(texts) > 1]
    replies = ask([_list_query(examples[i], shown[i]) for i in asked])
    scores = [np.zeros(len(texts)) for texts in shown]  # What is alone is first.
    for i, reply in zip(asked, replies, strict=True):
      order = None if reply is None else parse_order(reply, len(shown[i]))
      scores[i] -= np.nan if order is None else np.array(order)
    return _ranking(responses, shown, scores)

  return rank


def pairwise_ranker(ask: AskFn, prompts: Prompts) -> CompareFn:
  """An oracle that compares every two of a group, in both orders, and counts wins.

  A tie, or two verdicts that contradict each other, is half a win for both. A pair of
  which a verdict cannot be told makes its group invalid. Beside a response, an empty
  one loses.

  Args:
    prompts: hold the rules of the judge.
  """

  def rank(examples, responses):
    shown = [_distinct(texts) for texts in responses]
    pairs = {}
    for i, (about, texts) in enumerate(zip(examples, shown, strict=True)):
      for a, b in itertools.combinations(range(len(texts)), 2):
        id, said = f"{a}-{b}:{about['id']}", (texts[a], texts[b])
        pairs[i, a, b] = AnswerPair(id, about["video"], about["question"], *said)
    scores = [np.zeros(len(texts)) for texts in shown]
    judged = judge_pairs([*pairs.values()], ask, prompts)
    for (i, a, b), outcome in zip(pairs, judged, strict=True):
      lost = compute_win(outcome)
      if outcome.name == "empty":
        lost = float(not shown[i][a])
      lost = np.nan if lost is None else lost
      scores[i][[a, b]] += np.array([1 - lost, lost])
    return _ranking(responses, shown, scores)

  return rank


def noisy_ranker(rank: CompareFn, *, share: float, seed: int) -> CompareFn:
  """Returns an oracle that errs: a share of the responses have their ranks shuffled.

  Which ones, and how, depends on the question and the responses alone.

  Args:
    rank: an oracle that does not err.
    share: of the responses; the ranks of those drawn in a group go round among them.
    seed: of the run.
  """

  def noisy(examples, responses):
    found = rank(examples, responses)
    scores = found.scores.copy()
    for row, example, texts in zip(scores, examples, responses, strict=True):
      said = zlib.crc32("\0".join([example["id"], *texts]).encode())
      rng = np.random.default_rng([seed, said])
      drawn = np.flatnonzero(rng.random(len(row)) < share)
      row[drawn] = rng.permutation(row[drawn])
    return found._replace(scores=scores)

  return noisy


def make_score_fn(
  compare: CompareFn,
  examples: Sequence[Example],
  read: Callable[[np.ndarray, np.ndarray], Sequence[str]],
  *,
  eos: int | None,
) -> Callable[[Any, Any], Any]:
  """A scorer for Parts.score, which runs on the host, outside jit.

  It reads frozen["example_ids"]: the numbers of the examples that the prompts of the batch
  are, once each. Every process scores the whole batch: rules cost nothing, and judges
  spread their queries over devices or, if they are servers, over processes.

  Args:
    compare: Scores the responses of each group.
    examples: The examples that frozen["example_ids"] counts.
    read: The responses' texts, from tokens and loss_mask.
    eos: Last token of a response that was not cut. None: cut ones are scored like
      the others.
  """

  def score(frozen, batch):
    asked = [examples[i] for i in np.asarray(frozen["example_ids"])]
    tokens, mask = distributed.fetch_arrays((batch.tokens, batch.loss_mask))
    texts: list[str | None] = list(read(tokens, mask))
    if eos is not None:
      ended = np.any((tokens == eos) & mask, axis=1)
      texts = [
        text if whole else None for text, whole in zip(texts, ended, strict=True)
      ]
    size = len(texts) // len(asked)
    groups = [texts[i : i + size] for i in range(0, len(texts), size)]
    found = compare(asked, groups)
    return found.scores.reshape(-1).astype(np.float32), found.valid.reshape(-1)

  return score


def _distinct(texts: Sequence[str]) -> list[str]:
  """What is said, once each."""
  return list(dict.fromkeys(map(join_lines, texts)))


def _ranking(
  responses: Sequence[Sequence[str]],
  shown: Sequence[Sequence[str]],
  scores: Sequence[np.ndarray],
) -> Comparison:
  """Each response ranked by the score of what it says.

  NaN is for no score: a group with one is invalid whole.
  """
  rows = []
  for texts, said, of_said in zip(responses, shown, scores, strict=True):
    known = dict(zip(said, of_said, strict=True))
    rows.append([known[join_lines(text)] for text in texts])
  table = np.array(rows, float)
  valid = np.isfinite(table).all(axis=1, keepdims=True)
  return Comparison(
    -compute_ranks(table).astype(float), valid.repeat(table.shape[1], 1)
  )


def _list_query(example: Example, texts: Sequence[str]) -> JudgeQuery:
  count = len(texts)
  prompt = LIST_PROMPT.format(
    count=count,
    question=example["question"],
    responses="\n".join(f"[{n}] {text}" for n, text in enumerate(texts, 1)),
    example=[*range(2, count + 1), 1],
  )
  return JudgeQuery(f"list:{example['id']}", example["video"], prompt)
