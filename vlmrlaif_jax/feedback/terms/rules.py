"""Built-in terms that need no model: functions of samples, like a user's own.

`REWARD_RULES` lists them by the name that `fn` gives. Each returns a value per sample,
or None where the value is not defined.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from vlmrlaif_jax.feedback import answers
from vlmrlaif_jax.feedback.terms.sample import Sample

Values = list[float | None]


def score_missing_stop(samples: Sequence[Sample]) -> Values:
  """Returns 1 for a response without EOS, else 0; a weight below 0 is a penalty."""
  return [float(not sample.stopped) for sample in samples]


def score_length(samples: Sequence[Sample]) -> Values:
  """Returns the length of each response, as a share of the largest length."""
  return [len(sample.tokens) / sample.max_tokens for sample in samples]


def score_regex(
  samples: Sequence[Sample], *, pattern: str, full: bool = False
) -> Values:
  """Returns whether a response matches a regular expression.

  Args:
    samples: Responses.
    pattern: A pattern of Python's `re`; "." also matches a new line.
    full: Whether the pattern must match the whole response, or a part of it.
  """
  compiled = re.compile(pattern, re.DOTALL)
  match = compiled.fullmatch if full else compiled.search
  return [float(match(sample.response.strip()) is not None) for sample in samples]


def score_format(
  samples: Sequence[Sample], *, tags: Sequence[str] = ("think", "answer")
) -> Values:
  """Returns whether a response consists of one block of each tag, in this order.

  Args:
    samples: Responses.
    tags: Names of the tags, as in "<think>...</think><answer>...</answer>".
  """
  blocks = [
    rf"<{re.escape(t)}>(?:(?!</?{re.escape(t)}>).)*</{re.escape(t)}>" for t in tags
  ]
  return score_regex(samples, pattern=r"\s*".join(blocks), full=True)


def score_match(samples: Sequence[Sample], *, measure: str = "match") -> Values:
  """Compares each response with its reference answer; None without a reference.

  Args:
    samples: Responses.
    measure: A key of answers.ANSWER_MEASURES.

  Raises:
    ValueError: The measure does not exist.
  """
  if measure not in answers.ANSWER_MEASURES:
    known = ", ".join(answers.ANSWER_MEASURES)
    raise ValueError(f"measure must be one of {known}, not {measure!r}")
  compare = answers.ANSWER_MEASURES[measure]
  return [
    float(compare(s.response, s.answer, s.prompt)) if s.answer else None
    for s in samples
  ]


REWARD_RULES: dict[str, Callable[..., Any]] = {
  "stop": score_missing_stop,
  "length": score_length,
  "exact_match": score_match,
  "regex": score_regex,
  "format": score_format,
}
