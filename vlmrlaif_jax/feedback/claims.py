"""Scores answers by their claims and selects preference pairs (RLAIF-V, 2405.17220).

`check_claims` is the main function. A model or rules divide an answer into claims, each
with a yes-or-no question. A model answers these questions about the video. The score
of an answer is minus the number of denied claims. Long answers therefore score lower;
`balance_lengths` compensates for this.
"""

import itertools
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
from vlmrlaif_jax.feedback.replies.lists import parse_list
from vlmrlaif_jax.feedback.replies.options import parse_yes_no

# Outcomes of an answer. Only a scored answer can be part of a pair.
CLAIM_OUTCOMES = ("scored", "no_claims", "mismatched", "unanswered")
RHO_STEPS = 50  # balance_lengths tries 0, 1/50, .. 49/50.

YesNoProbs: TypeAlias = tuple[float, float]  # Probabilities of yes and of no.
YesNoFn: TypeAlias = Callable[[Sequence[JudgeQuery]], Sequence[YesNoProbs | None]]
AnswerKey: TypeAlias = tuple[int, str]  # Index of an example, and an answer to it.


class ClaimPrompts(NamedTuple):
  """Prompt templates of one style. A list has one item per line."""

  split: str  # Requests the claims of an answer; has {question} and {answer}.
  questions: str  # Requests a question for each claim; has {claims}, a list.
  bullet: str  # Prefix of each item of a list.


BRIEF_CLAIM_PROMPTS = ClaimPrompts(
  split="List what the answer claims. Question: {question} Answer: {answer}",
  questions="Turn each into a question.\n{claims}",
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
  questions=(
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


# The claims of an answer and the yes-or-no query of each. None: no reply to the prompt.
DividedAnswer: TypeAlias = tuple[Sequence[str] | None, Sequence[JudgeQuery] | None]
# (examples, answers to each) -> each distinct answer of each example, divided.
DivideFn: TypeAlias = Callable[
  [Sequence[Example], Sequence[Sequence[str]]], Mapping[AnswerKey, DividedAnswer]
]


class CheckedAnswer(NamedTuple):
  """An answer's score and the replies that it is computed from."""

  outcome: str  # One of CLAIM_OUTCOMES.
  score: int | None = None  # Minus the number of denied claims; None if not scored.
  claims: Sequence[str] = ()
  yes_no_probs: Sequence[YesNoProbs | None] = ()  # One per claim; None: no reply.


# Scoring.


def check_claims(
  examples: Sequence[Example],
  answers: Sequence[Sequence[str]],
  divide: DivideFn,
  yes_no: YesNoFn,
) -> list[list[CheckedAnswer]]:
  """Divides the answers to each example into claims and scores them.

  Equal answers to an example are divided once. Equal questions about it are sent once.
  Answers are not truncated: the original's limit of 300 words loses the last claims of
  a long answer.

  Args:
    examples: Examples with question and video.
    answers: Answers to each example.
    divide: Divides answers; see `ask_for_claims` and `split_by_rules`.
    yes_no: Answers the questions; see `compute_yes_no_probs` and `ask_yes_no`.

  Returns:
    The checked answers to each example, in the order of `answers`.
  """
  divided = divide(examples, answers)
  queries: dict[tuple[int, tuple], JudgeQuery] = {}
  for (i, _), (claims, checks) in divided.items():
    if claims and checks is not None and len(checks) == len(claims):
      queries |= {(i, make_query_key(check)): check for check in checks}
  probs_by_query = dict(zip(queries, yes_no([*queries.values()]), strict=True))

  def check_answer(i: int, text: str) -> CheckedAnswer:
    claims, checks = divided[i, text]
    if claims is None:
      return CheckedAnswer("unanswered")
    if not claims:
      return CheckedAnswer("no_claims")
    if checks is None:
      return CheckedAnswer("unanswered", None, claims)
    if len(checks) != len(claims):
      return CheckedAnswer("mismatched", None, claims)
    probs = [probs_by_query[i, make_query_key(check)] for check in checks]
    # A tie denies the claim.
    denied = [not pair[0] > pair[1] for pair in probs if pair is not None]
    if len(denied) < len(probs):
      return CheckedAnswer("unanswered", None, claims, probs)
    return CheckedAnswer("scored", -sum(denied), claims, probs)

  return [[check_answer(i, text) for text in texts] for i, texts in enumerate(answers)]


def ask_for_claims(ask: AskFn, prompts: ClaimPrompts) -> DivideFn:
  """Returns a function that prompts a model for claims, then for their questions.

  Args:
    ask: Model that replies to the prompts; it does not need the video.
    prompts: Templates of the two prompts.
  """

  def divide(examples, answers):
    rewrites = {}
    claims = list_claims(ask, prompts, examples, answers)
    for (i, text), items in claims.items():
      if items:
        listed = "\n".join(prompts.bullet + claim for claim in items)
        prompt = prompts.questions.format(claims=listed)
        rewrites[i, text] = _make_query("turn", examples[i], text, prompt)
    questions = _ask_lists(ask, rewrites)
    checks = {
      (i, text): items
      and [
        _make_query("check", examples[i], q, CLAIM_CHECK.format(question=q))
        for q in items
      ]
      for (i, text), items in questions.items()
    }
    return {key: (items, checks.get(key)) for key, items in claims.items()}

  return divide


def list_claims(
  ask: AskFn,
  prompts: ClaimPrompts,
  examples: Sequence[Example],
  answers: Sequence[Sequence[str]],
) -> dict[AnswerKey, list[str] | None]:
  """Requests the claims of each distinct answer to each example from a model.

  Args:
    ask: Model that replies to the prompts; it does not need the video.
    prompts: Templates of the prompts.
    examples: Examples with question and video.
    answers: Answers to each example.

  Returns:
    The claims of each answer; None for a reply without a list.
  """
  splits = {}
  for i, (example, texts) in enumerate(zip(examples, answers, strict=True)):
    for text in texts:
      prompt = prompts.split.format(question=example["question"], answer=text)
      splits[i, text] = _make_query("split", example, text, prompt)
  return _ask_lists(ask, splits)


def split_by_rules(
  rule: Callable[[str, str], Sequence[tuple[str, str]]], check: str
) -> DivideFn:
  """Returns a function that divides answers of a known form by rules.

  Args:
    rule: Maps (question, answer) to the claims, each as (question, its answer).
    check: Prompt with the question whether the last answer is right.
  """

  def divide(examples, answers):
    divided = {}
    for i, (example, texts) in enumerate(zip(examples, answers, strict=True)):
      for text in dict.fromkeys(texts):
        turns = rule(example["question"], text)
        checks = [
          _make_query("check", example, repr(turn), check, (turn,)) for turn in turns
        ]
        divided[i, text] = ([answer for _, answer in turns], checks)
    return divided

  return divide


def ask_yes_no(ask: AskFn) -> YesNoFn:
  """Returns a YesNoFn that parses replies, for models without probabilities."""

  def yes_no(queries):
    answers = [None if text is None else parse_yes_no(text) for text in ask(queries)]
    return [None if yes is None else (float(yes), float(not yes)) for yes in answers]

  return yes_no


def normalize_yes_no(
  logits: Float[Array, "*batch vocab"], yes: Sequence[int], no: Sequence[int]
) -> Float[Array, "*batch 2"]:
  """Computes the probabilities of yes and of no as the first token.

  Args:
    logits: Logits of the first token, at temperature 1 and without penalties.
    yes: Token ids of "yes" and "Yes".
    no: Token ids of "no" and "No".

  Returns:
    The two probabilities, normalized over the whole vocabulary.
  """
  probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  total = lambda ids: jnp.sum(probs[..., jnp.array(sorted(set(ids)))], axis=-1)
  return jnp.stack([total(yes), total(no)], axis=-1)


def _make_query(
  kind: str, example: Example, text: str, prompt: str, history=()
) -> JudgeQuery:
  # The id seeds the sampling of the reply, so each text requires its own.
  digest = zlib.crc32(text.encode())
  id = f"{kind}:{digest:08x}:{example['id']}"
  return JudgeQuery(id, example["video"], prompt, history)


def _ask_lists(
  ask: AskFn, queries: Mapping[AnswerKey, JudgeQuery]
) -> dict[AnswerKey, list[str] | None]:
  """Returns the list in the reply to each query; None if there is no reply."""
  texts = ask([*queries.values()])
  items = lambda text: None if text is None else parse_list(text)
  return {k: items(text) for k, text in zip(queries, texts, strict=True)}


# Pairs.


def choose_pairs(
  id: str,
  answers: Sequence[str],
  scores: Sequence[int | None],
  *,
  seed: int,
  limit: int = 2,
  gap: int = 1,
) -> list[tuple[int, int]]:
  """Samples pairs of answers to a question, uniformly and without replacement.

  Equal answers count as one, so that no pair is sampled twice. The result depends on
  the seed, the id and the scores only.

  Args:
    id: Id of the question.
    answers: Answers to the question.
    scores: Score of each answer. None excludes the answer.
    seed: Seed of the run.
    limit: Largest number of pairs.
    gap: Smallest difference between the scores of a pair.

  Returns:
    Pairs (chosen, rejected) of indices into `answers`.
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
  """Selects pairs such that chosen and rejected answers have similar mean lengths.

  A pair is selected if (rejected - chosen) / rejected <= rho, with lengths in words.
  Rho is the value among 0, 0.02, .. 0.98 with the smallest difference of the mean
  lengths, relative to the rejected answers. Of equal values, the largest is used.

  Args:
    pairs: Texts (chosen, rejected). Pairs of equal texts are never selected.

  Returns:
    The indices of the selected pairs, and rho.
  """
  words = np.array([[len(t.split()) for t in pair] for pair in pairs], int)
  chosen, rejected = words.reshape(-1, 2).T
  differ = np.array([a != b for a, b in pairs], bool)

  def select(step):  # Integers are exact, so pairs at the bound are selected.
    return differ & (RHO_STEPS * (rejected - chosen) <= step * rejected)

  def compute_imbalance(step):
    selected = select(step)
    if not selected.any():
      return np.inf
    total = rejected[selected].sum()
    return abs(chosen[selected].sum() - total) / max(total, 1)

  best = min(reversed(range(RHO_STEPS)), key=compute_imbalance)
  return np.flatnonzero(select(best)).tolist(), best / RHO_STEPS


# Best-of-n at inference.


def compute_self_rewards(
  logps: Float[AnyArray, "*batch"],
  ref_logps: Float[AnyArray, "*batch"],
  lengths: Int[AnyArray, "*batch"],
  *,
  beta: float = 0.1,
) -> Float[np.ndarray, "*batch"]:
  """Computes the implicit reward of a DPO policy per token, for best-of-n.

    beta * (log p - log p_ref) / length

  Args:
    logps: Log-probabilities of whole answers under the policy, at temperature 1.
    ref_logps: Log-probabilities under the reference policy.
    lengths: Tokens of each answer, including EOS. All ones give DPO's own reward, which
      prefers short answers.
    beta: Coefficient of the DPO loss.

  Returns:
    The reward of each answer; -inf for an answer without tokens.
  """
  rewards = beta * (logps - ref_logps) / np.maximum(lengths, 1)
  return np.where(lengths > 0, rewards, -np.inf)
