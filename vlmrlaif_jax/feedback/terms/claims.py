"""The term `claims`: checks each claim of a response (RLAIF-V, 2405.17220).

The value of a response is

  (accepted - denied) / max(accepted + denied + missing, 1)

over its distinct claims, and the facts of the reference that it does not state.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_choices, subsection
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.feedback import claims
from vlmrlaif_jax.feedback.claims import CheckedAnswer
from vlmrlaif_jax.feedback.pairwise_judge import AskFn, JudgeQuery, hide_videos
from vlmrlaif_jax.feedback.replies.options import parse_yes_no
from vlmrlaif_jax.feedback.terms import servers
from vlmrlaif_jax.feedback.terms.functions import Outcome
from vlmrlaif_jax.feedback.terms.sample import Sample, make_example
from vlmrlaif_jax.feedback.terms.servers import JudgeSources

CLAIM_JUDGES = (*servers.TERM_JUDGES, "truth")
STATES_PROMPT = (
  "Does the text state the fact below, in whatever words? Please answer yes or no.\n"
  "Text: {response}\nFact: {fact}"
)


class ClaimCounts(NamedTuple):
  """Numbers of the claims of a response."""

  accepted: int  # Distinct claims that the judge accepts.
  denied: int  # Distinct claims that the judge denies.
  missing: int  # Facts of the reference that the response does not state.


def compute_claim_value(counts: ClaimCounts) -> float:
  """Returns the value of a response, from -1 to 1; 0 without claims."""
  return (counts.accepted - counts.denied) / max(sum(counts), 1)


def read_claims_settings(kwargs: Mapping[str, Any], server: ConfigDict) -> ConfigDict:
  """Returns the settings of the term `claims`, after a check.

  They are the "judge" (one of CLAIM_JUDGES), those of a server, the "style" of the
  prompts, and whether "missing" facts of the reference count.

  Raises:
    ValueError: A setting is unknown or wrong. The message starts with "kwargs.".
  """
  with subsection("kwargs"):
    config = servers.read_server_settings(kwargs, server, style="paper", missing=True)
    styles = claims.CLAIM_PROMPT_STYLES
    check_choices(config, {"style": styles})
    servers.check_judge(config, CLAIM_JUDGES)
  return config


def make_claims_term(
  kwargs: Mapping[str, Any], sources: JudgeSources
) -> Callable[[Sequence[Sample]], list[Outcome]]:
  """Returns a function that scores samples by their claims.

  Every process must call it. Replies of a server are cached by content.

  Args:
    kwargs: See read_claims_settings.
    sources: The judges that may be selected.
  """
  config = read_claims_settings(kwargs, sources.server)
  count = functools.partial(count_true_claims, has_missing=config.missing)
  if config.judge != "truth":
    ask = servers.make_ask(config, sources)
    count = functools.partial(
      count_accepted_claims,
      ask=ask,
      # The policy requires a video, which texts about texts do not need.
      ask_text=ask if config.judge == "self" else hide_videos(ask),
      prompts=claims.CLAIM_PROMPT_STYLES[config.style],
      has_missing=config.missing,
    )

  def score(samples: Sequence[Sample]) -> list[Outcome]:
    return [
      Outcome(None, counts)
      if isinstance(counts, str)
      else Outcome(compute_claim_value(counts))
      for counts in count(samples)
    ]

  return score


# The truth of the embedded world.


def count_true_claims(
  samples: Sequence[Sample], *, has_missing: bool
) -> list[ClaimCounts | str]:
  """Counts claims by the truth of the embedded world.

  A short answer is one claim. A sentence of unknown form is one denied claim.

  Args:
    samples: Responses.
    has_missing: Whether missing facts count.

  Returns:
    The counts of each sample; the reason for a sample of another data set.
  """
  counts = [_compare_with_scene(sample) for sample in samples]
  if has_missing:
    return counts
  return [
    each if isinstance(each, str) else each._replace(missing=0) for each in counts
  ]


def _compare_with_scene(sample: Sample) -> ClaimCounts | str:
  truth = sample.record.get("truth") or {}
  if "scene" not in truth:
    return (
      f"the record {sample.id} is not of the embedded world, so kwargs.judge='truth' "
      "has no truth: set kwargs.judge='endpoint'"
    )
  if truth["kind"] == "description":
    reference = language.describe_scene(scene.scene_from_json(truth["scene"]))
    true, stated = (
      {*language.split_claims(text)} for text in (reference, sample.response)
    )
    return ClaimCounts(len(stated & true), len(stated - true), len(true - stated))
  correct = language.is_correct(sample.response, truth["answer"])
  is_wrong = bool(sample.response.strip()) and not correct
  return ClaimCounts(int(correct), int(is_wrong), int(not correct))


# A model.


def count_accepted_claims(
  samples: Sequence[Sample],
  *,
  ask: AskFn,
  ask_text: AskFn,
  prompts: claims.ClaimPrompts,
  has_missing: bool,
) -> list[ClaimCounts | str]:
  """Counts claims by the replies of a model.

  The model divides a response into claims and turns each into a question. It then
  answers each question about the video. It also divides the reference answer, and
  compares its facts with the response.

  Args:
    samples: Responses.
    ask: The model.
    ask_text: The same for queries that do not need the video.
    prompts: Templates of the prompts for claims and questions.
    has_missing: Whether missing facts count.

  Returns:
    The counts of each sample; the reason for a reply that cannot be read.
  """
  examples = [make_example(sample) for sample in samples]
  responses = [[s.response] if s.response.strip() else [] for s in samples]
  checked = claims.check_claims(
    examples,
    responses,
    claims.ask_for_claims(ask_text, prompts),
    claims.ask_yes_no(ask),
  )
  missing: list[int | None] = [0] * len(samples)
  if has_missing:
    answers = [[sample.answer] if sample.answer else [] for sample in samples]
    divided = claims.list_claims(ask_text, prompts, examples, answers)
    facts = [divided.get((i, s.answer), []) for i, s in enumerate(samples)]
    missing = _count_missing(samples, facts, ask_text)
  return [
    _count_verdicts(rows[0] if rows else CheckedAnswer("no_claims"), number)
    for rows, number in zip(checked, missing, strict=True)
  ]


def _count_missing(
  samples: Sequence[Sample], facts: Sequence[Sequence[str] | None], ask: AskFn
) -> list[int | None]:
  """Counts the facts that each response does not state; None if that is unknown."""
  queries = {
    (i, fact): JudgeQuery(
      f"states:{sample.id}",
      sample.video,
      STATES_PROMPT.format(response=sample.response, fact=fact),
    )
    for i, sample in enumerate(samples)
    for fact in facts[i] or ()
  }
  replies = dict(zip(queries, ask([*queries.values()]), strict=True))

  def count(i: int, own: Sequence[str] | None) -> int | None:
    if own is None:
      return None
    verdicts = [parse_yes_no(replies[i, fact] or "") for fact in dict.fromkeys(own)]
    return None if None in verdicts else verdicts.count(False)

  return [count(i, own) for i, own in enumerate(facts)]


def _count_verdicts(checked: CheckedAnswer, missing: int | None) -> ClaimCounts | str:
  if checked.outcome not in ("scored", "no_claims"):
    return f"the judge's replies about the claims of the response: {checked.outcome}"
  if missing is None:
    return "the judge's replies about the facts of the reference answer: unanswered"
  # Equal claims count once.
  probs = dict(zip(checked.claims, checked.yes_no_probs, strict=True))
  accepted = sum(pair is not None and pair[0] > pair[1] for pair in probs.values())
  return ClaimCounts(accepted, len(probs) - accepted, missing)
