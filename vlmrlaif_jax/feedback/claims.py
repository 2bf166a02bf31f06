"""Answers scored by divide and conquer, and pairs made of them (RLAIF-V, 2405.17220).

An answer is divided into claims, each with a question that yes or no answers: by a
model (`by_asking`) or by rules (`by_rule`). A model that sees the video is asked each.
An answer's score is minus the number of its claims that are denied: not a share, so
that long answers score lower, which `balance_lengths` makes up for.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlmrlaif_jax.core.types import AnyArray
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.pairwise_judge import AskFn, JudgeQuery, make_query_key

# What can become of an answer; only a scored one can be of a pair.
CLAIM_OUTCOMES = ("scored", "no_claims", "mismatched", "unanswered")
RHO_STEPS = 50  # balance_lengths tries 0, 1/50, .. 49/50.

YesNoProbs: TypeAlias = tuple[float, float]  # The probabilities of yes and of no.
YesNo: TypeAlias = Callable[[Sequence[JudgeQuery]], Sequence[YesNoProbs | None]]
_Key: TypeAlias = tuple[int, str]  # The number of an example, and an answer to it.


class ClaimPrompts(NamedTuple):
  """The texts of one style. A list is asked for, and given, as a line for each item."""

  split: str  # With {question}, {answer}: what does the answer claim?
  turn: str  # With {claims}, a list: each as a question.
  bullet: str  # Before each item of a list.


BRIEF_CLAIM_PROMPTS = ClaimPrompts(
  split="List what the answer claims. Question: {question} Answer: {answer}",
  turn="Turn each into a question.\n{claims}",
  bullet="",
)

PAPER_CLAIM_PROMPTS = ClaimPrompts(
  split=(
    "You are an expert in finding the facts that an answer to a question about a "
    "video states. Extract the facts from the answer below and rewrite each as a "
    "sentence that can be understood by itself. Leave out opinions and whatever is "
    'subjective. Write them under "### Facts:" as a list, each on a line of its own '
    'that starts with "- ".\n'
    "### Question: {question}\n### Answer: {answer}"
  ),
  turn=(
    "Turn each of the sentences below into a question that can be answered by yes or "
    "no, one by one and in the same order. Keep the tense and the words of negation, "
    'and add nothing. Write the questions under "### Modified sentences:" as a list, '
    'each on a line of its own that starts with "- ".\n'
    "### Sentences:\n{claims}"
  ),
  bullet="- ",
)

CLAIM_PROMPT_STYLES = {"brief": BRIEF_CLAIM_PROMPTS, "paper": PAPER_CLAIM_PROMPTS}
CLAIM_CHECK = "{question} Please answer yes or no."


# What an answer claims, and whether each claim holds as a question that yes or no
# answers; None for what could not be asked.
DividedAnswer: TypeAlias = tuple[Sequence[str] | None, Sequence[JudgeQuery] | None]
# (questions, the answers to each) -> each different answer of each group.
DivideFn: TypeAlias = Callable[
  [Sequence[Example], Sequence[Sequence[str]]], Mapping[_Key, DividedAnswer]
]


class CheckedAnswer(NamedTuple):
  """What became of an answer, and how that was found."""

  outcome: str  # Of OUTCOMES.
  score: int | None = None  # Minus the number of claims denied; None if not scored.
  claims: Sequence[str] = ()
  chances: Sequence[YesNoProbs | None] = ()  # One for each claim.


# Answers into scores.


def check_claims(
  examples: Sequence[Example],
  answers: Sequence[Sequence[str]],
  divide: DivideFn,
  yes_no: YesNo,
) -> list[list[CheckedAnswer]]:
  """What becomes of each of the answers to each example.

  Answers of a group that say the same are divided once, and a question that several
  of its answers raise is asked once. Nothing is cut: the original's limit of 300 words
  loses the last claims of a long answer.

  Args:
    divide: `by_asking` or `by_rule`.
    yes_no: answers the questions. See `yes_no_chances` and `by_text`.
  """
  divided = divide(examples, answers)
  asked: dict[tuple[int, tuple], JudgeQuery] = {}
  for (i, _), (claims, checks) in divided.items():
    if claims and checks is not None and len(checks) == len(claims):
      asked |= {(i, make_query_key(check)): check for check in checks}
  chances = dict(zip(asked, yes_no([*asked.values()]), strict=True))

  def checked(i: int, text: str) -> CheckedAnswer:
    """An answer by what was said of its claims; a tie of yes and no denies one."""
    claims, checks = divided[i, text]
    if claims is None:
      return CheckedAnswer("unanswered")
    if not claims:
      return CheckedAnswer("no_claims")
    if checks is None:
      return CheckedAnswer("unanswered", None, claims)
    if len(checks) != len(claims):
      return CheckedAnswer("mismatched", None, claims)
    found = [chances[i, make_query_key(check)] for check in checks]
    denied = [not pair[0] > pair[1] for pair in found if pair is not None]
    if len(denied) < len(found):
      return CheckedAnswer("unanswered", None, claims, found)
    return CheckedAnswer("scored", -sum(denied), claims, found)

  return [[checked(i, text) for text in texts] for i, texts in enumerate(answers)]


def ask_for_claims(ask: AskFn, prompts: ClaimPrompts) -> DivideFn:
  """Two questions to a model: what an answer claims, and each claim as a question.

  Args:
    ask: it need not see the video.
  """

  def divide(examples, answers):
    splits, turns = {}, {}
    for i, (example, texts) in enumerate(zip(examples, answers, strict=True)):
      for text in texts:
        prompt = prompts.split.format(question=example["question"], answer=text)
        splits[i, text] = _query("split", example, text, prompt)
    claims = _ask_lists(ask, splits)
    for (i, text), made in claims.items():
      if made:
        listed = "\n".join(prompts.bullet + claim for claim in made)
        prompt = prompts.turn.format(claims=listed)
        turns[i, text] = _query("turn", examples[i], text, prompt)
    questions = _ask_lists(ask, turns)
    checks = {
      (i, text): asked
      and [
        _query("check", examples[i], q, CLAIM_CHECK.format(question=q)) for q in asked
      ]
      for (i, text), asked in questions.items()
    }
    return {key: (made, checks.get(key)) for key, made in claims.items()}

  return divide


def split_by_rules(
  rule: Callable[[str, str], Sequence[tuple[str, str]]], check: str
) -> DivideFn:
  """Rules in place of a model, for answers of a known form.

  Args:
    rule: (question, answer) -> each claim as (a question, its answer).
    check: asks whether the last answer is right.
  """

  def divide(examples, answers):
    made = {}
    for i, (example, texts) in enumerate(zip(examples, answers, strict=True)):
      for text in dict.fromkeys(texts):
        found = rule(example["question"], text)
        asked = [_query("check", example, repr(turn), check, (turn,)) for turn in found]
        made[i, text] = ([said for _, said in found], asked)
    return made

  return divide


def parse_list(text: str) -> list[str]:
  """The items of a list: its lines, less their bullets, headings ("###") left out."""
  lines = [line.strip() for line in text.splitlines() if "###" not in line]
  items = [line.removeprefix("-").strip() for line in lines]
  return [item for item in items if item]


def parse_yes_no(text: str) -> YesNoProbs | None:
  """All for the one that a text starts with; None if it starts with neither."""
  found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
  if found is None:
    return None
  return (1.0, 0.0) if found[1].lower() == "yes" else (0.0, 1.0)


def parse_yes_no_probs(ask: AskFn) -> YesNo:
  """Yes or no by what a model says, where its probabilities cannot be had."""

  def yes_no(queries):
    return [None if text is None else parse_yes_no(text) for text in ask(queries)]

  return yes_no


def normalize_yes_no(
  logits: Float[Array, "*batch vocab"], yes: Sequence[int], no: Sequence[int]
) -> Float[Array, "*batch 2"]:
  """The probabilities of yes and of no as the first token, among all of the vocabulary.

  Args:
    logits: that predict the first token, untempered and without any penalty.
    yes: ids of "yes" and "Yes".
    no: ids of "no" and "No".
  """
  probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  of = lambda ids: jnp.sum(probabilities[..., jnp.array(sorted(set(ids)))], axis=-1)
  return jnp.stack([of(yes), of(no)], axis=-1)


def _query(what: str, about: Example, text: str, prompt: str, history=()) -> JudgeQuery:
  # What is sampled follows from the id, so it must not be of another text's.
  said = zlib.crc32(text.encode())
  return JudgeQuery(f"{what}:{said:08x}:{about['id']}", about["video"], prompt, history)


def _ask_lists(
  ask: AskFn, queries: Mapping[_Key, JudgeQuery]
) -> dict[_Key, list[str] | None]:
  """The list that each query is answered by; None for no answer."""
  texts = ask([*queries.values()])
  items = lambda text: None if text is None else parse_list(text)
  return {k: items(text) for k, text in zip(queries, texts, strict=True)}


# Scores into pairs.


def choose_pairs(
  id: str,
  answers: Sequence[str],
  scores: Sequence[int | None],
  *,
  seed: int,
  limit: int = 2,
  gap: int = 1,
) -> list[tuple[int, int]]:
  """(chosen, rejected) answers of a group, by number: at most `limit`, drawn evenly.

  Answers that say the same count as one, or a pair could be drawn twice. What is drawn
  follows from the seed, the group's id and the scores.

  Args:
    id: of the group's question.
    scores: of each answer; None leaves one out.
    gap: least difference of the scores.
  """
  scored = [
    (i, score)
    for i, score in enumerate(scores)
    if score is not None and answers.index(answers[i]) == i
  ]
  pairs = []
  for (a, score_a), (b, score_b) in itertools.combinations(scored, 2):
    difference = score_a - score_b
    if abs(difference) >= gap:
      pairs.append((a, b) if difference > 0 else (b, a))
  rng = np.random.default_rng([seed, zlib.crc32(id.encode())])
  drawn = rng.permutation(len(pairs))[:limit]
  return [pairs[i] for i in sorted(drawn)]


def balance_lengths(pairs: Sequence[tuple[str, str]]) -> tuple[list[int], float]:
  """The numbers of the pairs to keep, and rho: by how much of its length a rejected
  answer may outrun the chosen one.

  Kept are pairs with (rejected - chosen) / rejected <= rho, in words. Of the rhos 0,
  0.02, .. 0.98 that one is taken which makes the mean lengths of the kept chosen and
  rejected answers the most alike, relative to the rejected; of equals, the largest.

  Args:
    pairs: (chosen, rejected) texts; a pair of equal ones is left out.
  """
  words = np.array([[len(t.split()) for t in pair] for pair in pairs], int)
  chosen, rejected = words.reshape(-1, 2).T
  differ = np.array([a != b for a, b in pairs], bool)

  def kept_by(step):  # In whole numbers, so that what is at the bound is kept.
    return differ & (RHO_STEPS * (rejected - chosen) <= step * rejected)

  def imbalance(step):
    kept = kept_by(step)
    if not kept.any():
      return np.inf
    total = rejected[kept].sum()
    return abs(chosen[kept].sum() - total) / max(total, 1)

  best = min(reversed(range(RHO_STEPS)), key=imbalance)
  return np.flatnonzero(kept_by(best)).tolist(), best / RHO_STEPS


# Best of n, at inference.


def compute_self_rewards(
  logps: Float[AnyArray, "*batch"],
  ref_logps: Float[AnyArray, "*batch"],
  lengths: Int[AnyArray, "*batch"],
  *,
  beta: float = 0.1,
) -> Float[np.ndarray, "*batch"]:
  """What a policy trained by DPO thinks of answers, its own or another model's.

    beta * (log p - log p_ref) / length

  The best of n has the highest. -inf for an answer without tokens.

  Args:
    logps: of whole answers under the policy, at temperature 1.
    ref_logps: likewise, under the model that training began with.
    lengths: tokens of each answer, its end included. Ones leave DPO's own reward,
      which prefers short answers.
  """
  rewards = beta * (logps - ref_logps) / np.maximum(lengths, 1)
  return np.where(lengths > 0, rewards, -np.inf)
