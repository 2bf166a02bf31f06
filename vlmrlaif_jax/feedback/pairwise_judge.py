"""Judges which of two answers is better, in both orders.

`judge_pairs` is the main function. VLM-RLAIF (2402.03746) uses the SFT model as judge,
but does not publish its parsing of verdicts and handling of ties. Here, a pair has a
preference only if both orders prefer the same answer. Other pairs are counted by
reason.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from vlmrlaif_jax.data.prompts import Prompts, format_judge_prompt
from vlmrlaif_jax.data.video import Media
from vlmrlaif_jax.feedback.replies.verdicts import JudgeChoice, parse_verdict

# Outcomes of a pair with and without replies of the judge.
JUDGED = ("kept", "tie", "order_inconsistent", "unparsable")
UNJUDGED = ("identical", "empty", "too_long")
PAIR_OUTCOMES = (*JUDGED, *UNJUDGED)


class AnswerPair(NamedTuple):
  """Two answers to a question about a video."""

  id: str
  video: Media
  question: str
  output_1: str
  output_2: str
  narrative: str = ""  # Description of the video in the prompt; "" adds none.


class JudgeQuery(NamedTuple):
  """A prompt about a video or a range of its frames."""

  id: str  # Seeds the sampling, so replies do not depend on other queries.
  video: Media
  prompt: str
  history: tuple[tuple[str, str], ...] = ()  # Earlier turns: (prompt, response).
  start: int = 0  # First frame.
  stop: int | None = None  # Frame after the last; None: all frames.


# Returns the reply to each query; None if the query failed or was too long.
AskFn: TypeAlias = Callable[[Sequence[JudgeQuery]], Sequence[str | None]]


def hide_videos(ask: AskFn) -> AskFn:
  """Returns a judge that receives the texts of queries without their videos."""
  return lambda queries: ask([query._replace(video=()) for query in queries])


def make_query_key(query: JudgeQuery) -> tuple[Any, ...]:
  """Returns the fields that identify a query: all except the id."""
  return str(query.video), *query[2:]


def ask_unique(
  ask: AskFn, queries: Sequence[JudgeQuery]
) -> dict[tuple[Any, ...], str | None]:
  """Sends each distinct query once; returns make_query_key -> reply."""
  distinct = {make_query_key(query): query for query in queries}
  return dict(zip(distinct, ask(list(distinct.values())), strict=True))


def join_lines(text: str | None) -> str:
  """Replaces each run of white space by one space; returns "" for None."""
  return " ".join((text or "").split())


class PairOutcome(NamedTuple):
  """The result of judging a pair in both orders."""

  name: str  # One of PAIR_OUTCOMES.
  preference: Literal[1, 2] | None = None  # Better output of a pair that is "kept".
  # Replies to outputs (1, 2) and (2, 1); empty without replies.
  verdicts: tuple[str, ...] = ()


def combine_verdicts(
  first: JudgeChoice | None, second: JudgeChoice | None
) -> PairOutcome:
  """Combines the verdicts on a pair in both orders.

  An unparsable verdict outweighs a tie, and a tie outweighs a choice.

  Args:
    first: Verdict with outputs (1, 2) as A and B.
    second: Verdict with outputs (2, 1) as A and B.
  """
  if first is None or second is None:
    return PairOutcome("unparsable")
  if "tie" in (first, second):
    return PairOutcome("tie")
  if first == second:  # The same position is a different answer in each order.
    return PairOutcome("order_inconsistent")
  return PairOutcome("kept", 1 if first == "A" else 2)


def judge_pairs(
  pairs: Sequence[AnswerPair], ask: AskFn, prompts: Prompts
) -> list[PairOutcome]:
  """Judges each pair in both orders; skips pairs of identical or empty answers.

  Args:
    pairs: Answers to compare.
    ask: Judge that replies to queries.
    prompts: Prompts with the judge's rules.
  """
  reasons = [_find_skip_reason(pair) for pair in pairs]
  judged = [pair for pair, reason in zip(pairs, reasons, strict=True) if not reason]
  queries = [_make_query(p, prompts, swap) for swap in (False, True) for p in judged]
  replies = list(ask(queries))
  count = len(judged)
  both_orders = iter(list(zip(replies[:count], replies[count:], strict=True)))
  return [
    PairOutcome(reason) if reason else _combine_replies(*next(both_orders))
    for reason in reasons
  ]


def compute_win(outcome: PairOutcome) -> float | None:
  """Returns 1 if the second answer wins, 0 if the first, 1/2 if neither.

  None: the pair has no parsable verdicts.
  """
  if outcome.preference is not None:
    return float(outcome.preference - 1)
  return 0.5 if outcome.name in ("tie", "order_inconsistent") else None


def _find_skip_reason(pair: AnswerPair) -> str | None:
  """Returns the outcome of a pair that needs no judge, or None."""
  first, second = pair.output_1.split(), pair.output_2.split()
  if not first or not second:
    return "empty"
  return "identical" if first == second else None


def _make_query(pair: AnswerPair, prompts: Prompts, swap: bool) -> JudgeQuery:
  outputs = (pair.output_1, pair.output_2)
  a, b = outputs[::-1] if swap else outputs
  prompt = format_judge_prompt(
    prompts, question=pair.question, a=a, b=b, narrative=pair.narrative
  )
  return JudgeQuery(f"judge:{'BA' if swap else 'AB'}:{pair.id}", pair.video, prompt)


def _combine_replies(first: str | None, second: str | None) -> PairOutcome:
  if first is None or second is None:
    return PairOutcome("too_long")
  outcome = combine_verdicts(parse_verdict(first), parse_verdict(second))
  return outcome._replace(verdicts=(first, second))
