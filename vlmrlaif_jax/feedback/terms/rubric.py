"""The term `rubric`: judges each criterion of a rubric by yes or no (2605.30244).

The value of a response is the weighted share of the criteria that it meets. The paper
verifies some criteria by code, as a regular expression does here. It also shows no
images to the judge and puts essential criteria first, in place of weights.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import subsection
from vlmrlaif_jax.feedback.pairwise_judge import AskFn, JudgeQuery
from vlmrlaif_jax.feedback.replies.lists import parse_list
from vlmrlaif_jax.feedback.replies.options import parse_yes_no
from vlmrlaif_jax.feedback.terms import claims, servers
from vlmrlaif_jax.feedback.terms.functions import Outcome
from vlmrlaif_jax.feedback.terms.sample import Sample
from vlmrlaif_jax.feedback.terms.servers import JudgeSources

RUBRIC_JUDGES = (*servers.TERM_JUDGES, "truth")
WRITE_PROMPT = (
  "You are given a question about a video. Write at most five criteria for a good "
  "response to it. Each must be short, and it must be possible to say by yes or no "
  "whether a response meets it. Write them as a list, each on a line that starts with "
  '"- ".\nQuestion: {question}\nReference answer: {answer}'
)
MEETS_PROMPT = (
  "You are given a question about a video and a response to it. Does the response meet "
  "the criterion below? Please answer yes or no.\n"
  "Question: {question}\nResponse: {response}\nCriterion: {criterion}"
)


class Criterion(NamedTuple):
  """A criterion of a rubric."""

  text: str
  weight: float = 1.0  # Above 0.
  regex: str = ""  # Pattern that a response which meets it contains; "": the judge.


def read_rubric_settings(kwargs: Mapping[str, Any], server: ConfigDict) -> ConfigDict:
  """Returns the settings of the term `rubric`, after a check.

  They are the "judge" (one of RUBRIC_JUDGES), those of a server, and "sees_video".

  Raises:
    ValueError: A setting is unknown or wrong. The message starts with "kwargs.".
  """
  with subsection("kwargs"):
    config = servers.read_server_settings(kwargs, server, sees_video=True)
    servers.check_judge(config, RUBRIC_JUDGES)
  return config


def make_rubric_term(
  kwargs: Mapping[str, Any], sources: JudgeSources
) -> Callable[[Sequence[Sample]], list[Outcome]]:
  """Returns a function that scores samples by the criteria of their records.

  Every process must call it. The judge writes the criteria of a record without any. Its
  replies are cached by content, so it writes them once per prompt.

  Args:
    kwargs: See read_rubric_settings.
    sources: The judges that may be selected.
  """
  config = read_rubric_settings(kwargs, sources.server)
  if config.judge == "truth":
    return score_by_truth
  ask = servers.make_ask(config, sources)
  return lambda samples: score_by_rubric(samples, ask)


def score_by_rubric(samples: Sequence[Sample], ask: AskFn) -> list[Outcome]:
  """Returns the weighted share of the criteria that each response meets.

  An invalid rubric or an unreadable reply makes the sample invalid.

  Args:
    samples: Responses. The field "rubric" of a record has its criteria.
    ask: Judge that replies to queries.
  """
  rubrics = _find_rubrics(samples, ask)
  queries = {
    (i, criterion): JudgeQuery(
      f"meets:{sample.id}",
      sample.video,
      MEETS_PROMPT.format(
        question=sample.prompt, response=sample.response, criterion=criterion.text
      ),
    )
    for i, (sample, rubric) in enumerate(zip(samples, rubrics, strict=True))
    if not isinstance(rubric, str)
    for criterion in rubric
    if not criterion.regex
  }
  replies = dict(zip(queries, ask([*queries.values()]), strict=True))

  def decide(i: int, criterion: Criterion) -> bool | None:
    if criterion.regex:
      return re.search(criterion.regex, samples[i].response) is not None
    return parse_yes_no(replies[i, criterion] or "")

  def score(i: int, rubric: Sequence[Criterion] | str) -> Outcome:
    if isinstance(rubric, str):
      return Outcome(None, rubric)
    met = 0.0
    for criterion in rubric:
      verdict = decide(i, criterion)
      if verdict is None:
        return Outcome(None, f"the judge gave no yes or no on {criterion.text!r}")
      met += criterion.weight * verdict
    return Outcome(met / sum(each.weight for each in rubric))

  return [score(i, rubric) for i, rubric in enumerate(rubrics)]


def score_by_truth(samples: Sequence[Sample]) -> list[Outcome]:
  """Returns the weighted share of criteria that the truth of the embedded world has.

  The criteria are that the response states a fact, for each fact of the reference, and
  that it states nothing else, which weighs as much as all facts.
  """

  def score(counts: claims.ClaimCounts | str) -> Outcome:
    if isinstance(counts, str):
      return Outcome(None, counts)
    stated = counts.accepted / (counts.accepted + counts.missing)
    return Outcome((stated + (counts.denied == 0)) / 2)

  return [*map(score, claims.count_true_claims(samples, has_missing=True))]


def parse_rubric(rubric: Any) -> list[Criterion]:
  """Returns the criteria of the field "rubric" of a record.

  Args:
    rubric: Texts, or mappings with a "criterion", its "weight" (by default 1) and the
      "regex" of a criterion that the judge does not decide.

  Raises:
    ValueError: It has another form, a weight is not above 0, or a pattern is invalid.
  """
  if not isinstance(rubric, Sequence) or isinstance(rubric, str) or not rubric:
    raise ValueError(f"rubric must be a list of criteria, not {rubric!r}")
  return [_parse_criterion(each) for each in rubric]


def _parse_criterion(item: Any) -> Criterion:
  fields = {"criterion": item} if isinstance(item, str) else item
  if not isinstance(fields, Mapping) or set(fields) - {"criterion", "weight", "regex"}:
    raise ValueError(
      f"rubric must have texts, or criterion, weight and regex, not {item!r}"
    )
  text, weight = fields.get("criterion"), fields.get("weight", 1.0)
  if not isinstance(text, str) or not isinstance(weight, int | float) or not weight > 0:
    raise ValueError(f"rubric must have a text and a weight above 0, not {item!r}")
  regex = fields.get("regex", "")
  try:
    re.compile(regex)
  except (re.error, TypeError) as error:
    raise ValueError(
      f"rubric must have a regular expression of Python, not {regex!r}: {error}"
    ) from error
  return Criterion(text, float(weight), regex)


def _find_rubrics(
  samples: Sequence[Sample], ask: AskFn
) -> list[Sequence[Criterion] | str]:
  """Returns the criteria for each sample, or the reason why there are none."""
  queries = {
    i: JudgeQuery(
      f"rubric:{sample.id}",
      sample.video,
      WRITE_PROMPT.format(question=sample.prompt, answer=sample.answer or "unknown"),
    )
    for i, sample in enumerate(samples)
    if sample.record.get("rubric") is None
  }
  replies = dict(zip(queries, ask([*queries.values()]), strict=True))

  def find(i: int, sample: Sample) -> Sequence[Criterion] | str:
    if i not in replies:
      try:
        return parse_rubric(sample.record["rubric"])
      except ValueError as error:
        return f"the record {sample.id}: {error}"
    written = parse_list(replies[i] or "")
    return [*map(Criterion, written or ())] or "the judge wrote no readable criteria"

  return [find(i, sample) for i, sample in enumerate(samples)]
