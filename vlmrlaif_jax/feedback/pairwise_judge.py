"""Which of two answers is better, by a judge who is asked in both orders.

VLM-RLAIF (2402.03746) lets the SFT model judge, but has not published how it reads
the verdicts, nor what it does with ties. Here nothing is left to chance: a pair is
kept if both orders prefer the same answer, and counted by its reason if not.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from vlmrlaif_jax.data.prompts import Prompts, format_judge_prompt
from vlmrlaif_jax.data.video import VideoPath

JudgeChoice: TypeAlias = Literal[
  "A", "B", "tie"
]  # By where an answer stands in the prompt.

# What can become of a pair that the judge has judged, and of one that it has not.
JUDGED = ("kept", "tie", "order_inconsistent", "unparsable")
UNJUDGED = ("identical", "empty", "too_long")
PAIR_OUTCOMES = (*JUDGED, *UNJUDGED)

VERDICT_PATTERNS: dict[JudgeChoice, str] = {
  "A": r"\boutput a is better\b",
  "B": r"\boutput b is better\b",
  "tie": r"\bboth outputs are equally good\b",
}
# Before a verdict, any of these may turn it round.
DOUBT = re.compile(r"\b(not|no|never|neither|nor|cannot|whether|if|unless)\b|n't\b")


class AnswerPair(NamedTuple):
  """Two answers to a question about a video."""

  id: str
  video: VideoPath
  question: str
  output_1: str
  output_2: str
  narrative: str = ""  # What the judge is told of the video; "" for nothing.


class JudgeQuery(NamedTuple):
  """What a model is asked about a video, or about the frames start..stop-1 of it."""

  id: str  # What is sampled depends on it, not on what else is asked.
  video: VideoPath
  prompt: str
  history: tuple[tuple[str, str], ...] = ()  # The turns before it.
  start: int = 0
  stop: int | None = None


# What a judge says to each query; None if it could not be asked, or gave no answer.
AskFn: TypeAlias = Callable[[Sequence[JudgeQuery]], Sequence[str | None]]


def make_query_key(query: JudgeQuery) -> tuple[Any, ...]:
  """Returns what makes two queries the same: all but the id."""
  return str(query.video), *query[2:]


def ask_unique(
  ask: AskFn, queries: Sequence[JudgeQuery]
) -> dict[tuple[Any, ...], str | None]:
  """Returns the reply to each query, by what makes it the `same` as others."""
  once = {make_query_key(query): query for query in queries}
  return dict(zip(once, ask(list(once.values())), strict=True))


def join_lines(text: str | None) -> str:
  """Returns a text, whatever its white space; "" for None."""
  return " ".join((text or "").split())


class PairOutcome(NamedTuple):
  """What became of a pair."""

  name: str  # Of OUTCOMES.
  preference: Literal[1, 2] | None = None  # The better output, if the pair is kept.
  # What was said of outputs (1, 2) and (2, 1), in that order; empty if nothing was.
  verdicts: tuple[str, ...] = ()


def parse_verdict(text: str) -> JudgeChoice | None:
  """The choice that the first sentence names; None if it names none, or several.

  "Output A is better because it is not too long." is "A"; "It is not clear that
  output A is better." is None.
  """
  said = " ".join(re.split(r"[.!?]", text, maxsplit=1)[0].lower().split())
  found = {
    choice: match.start()
    for choice, pattern in VERDICT_PATTERNS.items()
    if (match := re.search(pattern, said))
  }
  if len(found) != 1:
    return None
  [(choice, start)] = found.items()
  return None if DOUBT.search(said[:start]) else choice


def combine_verdicts(
  first: JudgeChoice | None, second: JudgeChoice | None
) -> PairOutcome:
  """The outcome of asking with outputs (1, 2) as A and B, and then with (2, 1).

  A verdict that cannot be told outweighs a tie, and a tie outweighs a choice.
  """
  if first is None or second is None:
    return PairOutcome("unparsable")
  if "tie" in (first, second):
    return PairOutcome("tie")
  if first == second:  # The same place twice, so a different answer each time.
    return PairOutcome("order_inconsistent")
  return PairOutcome("kept", 1 if first == "A" else 2)


def judge_pairs(
  pairs: Sequence[AnswerPair], ask: AskFn, prompts: Prompts
) -> list[PairOutcome]:
  """Judges each pair in both orders; identical or empty answers are not asked about.

  Args:
    pairs: The answers to compare.
    ask: What the judge says to each query; None to one that is too long for it.
    prompts: Hold the judge's rules.
  """
  reasons = [_pointless(pair) for pair in pairs]
  asked = [pair for pair, reason in zip(pairs, reasons, strict=True) if not reason]
  texts = list(ask([_query(p, prompts, swap) for swap in (False, True) for p in asked]))
  orders = iter(list(zip(texts[: len(asked)], texts[len(asked) :], strict=True)))
  return [
    PairOutcome(reason) if reason else _outcome(*next(orders)) for reason in reasons
  ]


def compute_win(outcome: PairOutcome) -> float | None:
  """1 if the second answer wins, 0 if the first, 1/2 if neither; None if not judged."""
  if outcome.preference is not None:
    return float(outcome.preference - 1)
  return 0.5 if outcome.name in ("tie", "order_inconsistent") else None


def _pointless(pair: AnswerPair) -> str | None:
  """Why there is nothing to judge, if there is not."""
  first, second = pair.output_1.split(), pair.output_2.split()
  if not first or not second:
    return "empty"
  return "identical" if first == second else None


def _query(pair: AnswerPair, prompts: Prompts, swap: bool) -> JudgeQuery:
  outputs = (pair.output_1, pair.output_2)
  a, b = outputs[::-1] if swap else outputs
  prompt = format_judge_prompt(
    prompts, question=pair.question, a=a, b=b, narrative=pair.narrative
  )
  return JudgeQuery(f"judge:{'BA' if swap else 'AB'}:{pair.id}", pair.video, prompt)


def _outcome(first: str | None, second: str | None) -> PairOutcome:
  if first is None or second is None:
    return PairOutcome("too_long")
  outcome = combine_verdicts(parse_verdict(first), parse_verdict(second))
  return outcome._replace(verdicts=(first, second))
