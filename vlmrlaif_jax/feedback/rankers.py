"""Ranks the responses of a group by scores, by one list, or by pairs.

A ranker is an oracle in the sense of Oracle-RLAIF (2510.02561): its scores are minus
the ranks, without margins. `make_score_fn` turns any CompareFn into the scorer of an RL
method. A group that cannot be ranked is not valid.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Stops, is_stop
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
from vlmrlaif_jax.feedback.replies.rankings import parse_ranking
from vlmrlaif_jax.feedback.replies.verdicts import parse_verdict

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

  scores: Float[np.ndarray, "prompts group"]  # Undefined where not valid.
  valid: Bool[np.ndarray, "prompts group"]  # Whether a response has a score.
  calls: int = 0  # Number of queries to a judge.
  unread: int = 0  # Number of queries without a parsable reply.


# (examples, responses to each) -> their scores. All groups have one size. None is a
# truncated response; rankers never receive None.
CompareFn: TypeAlias = Callable[
  [Sequence[Example], Sequence[Sequence[str | None]]], Comparison
]


def compute_ranks(
  scores: Float[np.ndarray, "*batch group"],
) -> Int[np.ndarray, "*batch group"]:
  """Counts the higher scores in the group. Ties have equal ranks, as in 0, 0, 2."""
  return np.sum(scores[..., None, :] > scores[..., :, None], axis=-1)


def compute_win_rates(
  scores: Float[np.ndarray, "*batch group"],
) -> Float[np.ndarray, "*batch group"]:
  """Computes the share of the other responses of a group that each one beats.

  The mean of a group is 0.5 without ties, and lower with ties.

  >>> compute_win_rates(np.array([0.0, -1.0, -1.0]))
  array([1., 0., 0.])
  """
  wins = np.sum(scores[..., None, :] < scores[..., :, None], axis=-1)
  return wins / max(scores.shape[-1] - 1, 1)


def score_ranker(
  score: Callable[[Sequence[Example], Sequence[str]], np.ndarray],
) -> CompareFn:
  """Returns a ranker that sorts by a score of each response, as of a reward model.

  Equal responses have equal ranks.

  Args:
    score: Computes the score of each response to each example; NaN if not defined.
  """

  def rank(examples, responses):
    flat = [(e, t) for e, texts in zip(examples, responses, strict=True) for t in texts]
    scores = np.asarray(score([e for e, _ in flat], [t for _, t in flat]))
    joined = [[join_lines(text) for text in texts] for texts in responses]
    return _rank_groups(responses, joined, list(scores.reshape(len(examples), -1)))

  return rank


def truth_ranker(mistakes: Callable[[Example, str], int | None]) -> CompareFn:
  """Returns a ranker that sorts by the number of mistakes.

  Args:
    mistakes: Counts the mistakes of a response; None without ground truth.
  """

  def score(examples, texts):
    counts = [mistakes(e, t) for e, t in zip(examples, texts, strict=True)]
    return np.array([np.nan if count is None else -count for count in counts], float)

  return score_ranker(score)


def listwise_ranker(ask: AskFn) -> CompareFn:
  """Returns a ranker whose judge orders a whole group in one reply.

  Equal responses appear once in the prompt and have equal ranks.
  """

  def rank(examples, responses):
    distinct = [_list_distinct(texts) for texts in responses]
    indices = [i for i, texts in enumerate(distinct) if len(texts) > 1]
    replies = ask([_make_list_query(examples[i], distinct[i]) for i in indices])
    scores = [np.zeros(len(texts)) for texts in distinct]
    unread = 0
    for i, reply in zip(indices, replies, strict=True):
      ranks = None if reply is None else parse_ranking(reply, len(distinct[i]))
      scores[i] -= np.nan if ranks is None else np.array(ranks)
      unread += ranks is None
    comparison = _rank_groups(responses, distinct, scores)
    return comparison._replace(calls=len(indices), unread=unread)

  return rank


def pairwise_ranker(ask: AskFn, prompts: Prompts) -> CompareFn:
  """Returns a ranker that compares all pairs of a group and counts wins.

  Each pair is judged in both orders. A tie or two contradicting verdicts are half a win
  for both. An empty response loses. An unparsable verdict makes the group invalid.

  Args:
    ask: The judge.
    prompts: Prompts with the rules of the judge.
  """

  def rank(examples, responses):
    distinct = [_list_distinct(texts) for texts in responses]
    pairs = {}
    replies: list[str | None] = []

    def ask_and_record(queries):
      replies.extend(ask(queries))
      return replies

    for i, (example, texts) in enumerate(zip(examples, distinct, strict=True)):
      for a, b in itertools.combinations(range(len(texts)), 2):
        id, video, question = (example[key] for key in ("id", "video", "question"))
        pairs[i, a, b] = AnswerPair(
          f"{a}-{b}:{id}", video, question, texts[a], texts[b]
        )
    scores = [np.zeros(len(texts)) for texts in distinct]
    outcomes = judge_pairs([*pairs.values()], ask_and_record, prompts)
    for (i, a, b), outcome in zip(pairs, outcomes, strict=True):
      win = compute_win(outcome)  # 1 if b wins, 0 if a wins.
      if outcome.name == "empty":
        win = float(not distinct[i][a])
      win = np.nan if win is None else win
      scores[i][[a, b]] += np.array([1 - win, win])
    unread = sum(reply is None or parse_verdict(reply) is None for reply in replies)
    comparison = _rank_groups(responses, distinct, scores)
    return comparison._replace(calls=len(replies), unread=unread)

  return rank


def noisy_ranker(rank: CompareFn, *, share: float, seed: int) -> CompareFn:
  """Returns a ranker that orders a share of the pairs of each group wrongly.

  The noise depends on the seed, the question and the responses only.

  Args:
    rank: Ranker without noise.
    share: Share of the pairs with different ranks whose order is wrong, from 0 to 1.
      With 0.5 the order is random, with 1 it is reversed.
    seed: Seed of the run.
  """

  def rank_with_noise(examples, responses):
    comparison = rank(examples, responses)
    noisy = []
    for row, example, texts in zip(comparison.scores, examples, responses, strict=True):
      digest = zlib.crc32("\0".join([example["id"], *texts]).encode())
      noisy.append(reorder_pairs(row, share, np.random.default_rng([seed, digest])))
    return comparison._replace(scores=np.stack(noisy))

  return rank_with_noise


def reorder_pairs(
  scores: Float[np.ndarray, "group"], share: float, rng: np.random.Generator
) -> Float[np.ndarray, "group"]:
  """Returns ranks that order a share of the pairs unlike the scores.

  Each swap of two neighbors in the order makes exactly one more pair wrong. A number
  of pairs that is no integer is rounded up or down at random; its mean is exact.

  Args:
    scores: Scores; a higher one is better.
    share: Share of the pairs with different scores, from 0 to 1.
    rng: Source of random numbers.

  Returns:
    Minus the ranks. Neighbors in the order whose scores are equal share a rank.
  """
  order = np.argsort(-scores, kind="stable")
  pairs = np.sum(scores[:, None] > scores[None])
  for _ in range(int(share * pairs + rng.random())):
    first = rng.choice(np.flatnonzero(scores[order[:-1]] > scores[order[1:]]))
    order[[first, first + 1]] = order[[first + 1, first]]
  places = np.cumsum(np.append(0, scores[order[:-1]] != scores[order[1:]]))
  return -compute_ranks(-places[np.argsort(order)].astype(float)).astype(float)


def make_score_fn(
  compare: CompareFn,
  examples: Sequence[Example],
  read: Callable[[np.ndarray, np.ndarray], Sequence[str]],
  *,
  stops: Stops,
) -> Callable[[Any, Any], Any]:
  """Returns a scorer for Parts.score that runs on the host, outside jit.

  It reads frozen["example_ids"], the index of the example of each prompt. Every process
  scores the whole batch. Judges distribute their queries over devices or processes.

  Args:
    compare: Scores the responses of each group.
    examples: Examples that frozen["example_ids"] indexes.
    read: Decodes the responses from tokens and loss_mask.
    stops: Ids of the EOS tokens. `compare` receives None for responses without one.
      () passes all responses.
  """

  def score(frozen, batch):
    batch_examples = [examples[i] for i in np.asarray(frozen["example_ids"])]
    tokens, mask = distributed.fetch_arrays((batch.tokens, batch.loss_mask))
    texts: list[str | None] = list(read(tokens, mask))
    if stops:
      stopped = np.any(is_stop(tokens, stops) & mask, axis=1)
      texts = [text if end else None for text, end in zip(texts, stopped, strict=True)]
    size = len(texts) // len(batch_examples)
    groups = [texts[i : i + size] for i in range(0, len(texts), size)]
    comparison = compare(batch_examples, groups)
    scores, valid = comparison.scores, comparison.valid
    if not valid.any():
      raise UserError(
        f"the oracle scored no response to any of {len(groups)} prompts, so nothing "
        "can be learned: oracle.kind=truth requires the embedded world; for your own "
        "data, set oracle.kind=reward and terms in config.reward. A judge must write "
        "replies that can be read; see docs/judges.md"
      )
    return scores.reshape(-1).astype(np.float32), valid.reshape(-1)

  return score


def _list_distinct(texts: Sequence[str]) -> list[str]:
  """Lists the distinct texts, in order of their first occurrence."""
  return list(dict.fromkeys(map(join_lines, texts)))


def _rank_groups(
  responses: Sequence[Sequence[str]],
  distinct: Sequence[Sequence[str]],
  scores: Sequence[np.ndarray],
) -> Comparison:
  """Ranks each response by the score of its distinct text.

  A NaN score makes the whole group invalid.
  """
  rows = []
  for texts, names, values in zip(responses, distinct, scores, strict=True):
    score_by_text = dict(zip(names, values, strict=True))
    rows.append([score_by_text[join_lines(text)] for text in texts])
  table = np.array(rows, float)
  valid = np.isfinite(table).all(axis=1, keepdims=True)
  return Comparison(
    -compute_ranks(table).astype(float), valid.repeat(table.shape[1], 1)
  )


def _make_list_query(example: Example, texts: Sequence[str]) -> JudgeQuery:
  count = len(texts)
  prompt = LIST_PROMPT.format(
    count=count,
    question=example["question"],
    responses="\n".join(f"[{n}] {text}" for n, text in enumerate(texts, 1)),
    example=[*range(2, count + 1), 1],
  )
  return JudgeQuery(f"list:{example['id']}", example["video"], prompt)
