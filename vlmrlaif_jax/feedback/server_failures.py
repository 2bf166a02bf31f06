"""Failures of queries to a server: reasons, remedies, and when they end a run."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.interrupts import Stopped

# HTTP statuses that every query would receive, so that the first one ends the run.
FATAL_STATUSES = frozenset({301, 302, 307, 308, 401, 403, 404})
_MAX_CHARS = 200  # Characters of a server's error in a message.
# Reasons that may pass without a change of the settings: 5xx and these.
PASSING = ("timeout", "no connection", "http 408", "http 409", "http 425", "http 429")
REMEDIES = {  # By the start of the reason.
  "http 3": "Set url to the address that the server redirects to.",
  "http 401": "Check the key in key_env={key_env!r}.",
  "http 402": "Add credit to the account of the key.",
  "http 403": "Check the key in key_env={key_env!r}, and its access to the model.",
  "http 404": "Check url={url!r} and model={model!r}.",
  "http 413": "Lower frames={frames} or side={side}.",
  "http 429": "Lower concurrency={concurrency}, or raise retries={retries}.",
  "http 4": (
    "Change what the server rejects: frames={frames} images per query, "
    "max_tokens={max_tokens} as {length_field!r}, temperature={temperature} (below 0 "
    "sends none), or model={model!r}."
  ),
  "http 5": "Check the log of the server, and model={model!r}.",
  "timeout": "Raise timeout_s={timeout_s}, or lower concurrency={concurrency}.",
  "no connection": "Start the server, or correct url={url!r}.",
  "malformed": (
    "Check that url={url!r} is a chat completions API. If the model reasons, raise "
    "max_tokens={max_tokens}."
  ),
  "video": "Check that the videos of the records can be read.",
}


class QueryOutcome(NamedTuple):
  """The outcome of a query."""

  reply: str | None
  failure: str  # Reason without a reply, as "http 400: too many images"; "" with one.
  events: Sequence[str] = ()  # Keys of Endpoint.counts.

  def is_new_reply(self) -> bool:
    """Returns whether the server, not the cache, has replied."""
    return self.reply is not None and "cache" not in self.events


def describe_error(content: str, key: str) -> str:
  """Returns the reason in a server's error in one line, without the key.

  >>> describe_error('{"error": {"message": "no such model"}}', "sk-1")
  'no such model'
  """
  try:
    text = json.loads(content)
    text = text.get("error", text.get("detail", text.get("message", "")))
    text = text.get("message", "") if isinstance(text, dict) else text
  except (ValueError, AttributeError, RecursionError):
    text = content
  line = " ".join(str(text).split())
  return (line.replace(key, "***") if key else line)[:_MAX_CHARS]


def format_failures(outcomes: Sequence[QueryOutcome], counts: Mapping[str, int]) -> str:
  """Returns a line with the failures of a batch, and the counts since the start."""
  reasons = collections.Counter(each.failure for each in outcomes if each.failure)
  listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
  more = f" and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
  since = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
  failed = reasons.total()
  return f"{failed} of {len(outcomes)} queries failed ({listed}{more}); so far: {since}"


def raise_if_useless(
  config: ConfigDict, outcomes: Sequence[QueryOutcome], has_replied: bool
) -> None:
  """Ends the run if no query of a batch reached a judge that can reply.

  A batch that fails for passing reasons ends the run at any time, because a judge that
  is not there teaches nothing. A batch that the server rejects ends the run if the
  server has never replied; later, the queries may be to blame.

  Args:
    config: Settings of the server.
    outcomes: Outcomes of the batch.
    has_replied: Whether the server has replied in this run.

  Raises:
    UserError: The server rejects all queries, or the key, the url or the model.
    Stopped: The server fails for reasons that may pass.
  """
  failures = [each.failure for each in outcomes if each.failure]
  sent = [each for each in outcomes if "cache" not in each.events]
  is_fatal = any(_get_status(failure) in FATAL_STATUSES for failure in failures)
  if not is_fatal and (not failures or len(failures) < len(sent)):
    return
  passes = all(map(_is_passing, failures))
  if has_replied and not passes and not is_fatal:
    return
  [(reason, count)] = collections.Counter(failures).most_common(1)
  message = (
    f"the judge at {config.url} failed {len(failures)} of {len(sent)} queries of a "
    f"batch ({count} {reason}). {_find_remedy(reason, config)}"
  )
  if passes:
    raise Stopped(f"{message} Replies so far are saved")
  raise UserError(message)


def raise_if_interrupted(config: ConfigDict, outcomes: Sequence[QueryOutcome]) -> None:
  """Stops the run if a batch lost more than `max_failed` of its queries for a while.

  A stage that saves results in blocks would never send these queries again.

  Args:
    config: Settings of the server.
    outcomes: Outcomes of the batch.

  Raises:
    Stopped: More queries failed for reasons that may pass.
  """
  failures = [each.failure for each in outcomes if _is_passing(each.failure)]
  if len(failures) <= config.max_failed * len(outcomes):
    return
  [(reason, count)] = collections.Counter(failures).most_common(1)
  raise Stopped(
    f"the judge at {config.url} failed {len(failures)} of {len(outcomes)} queries of a "
    f"batch ({count} {reason}), more than endpoint.max_failed={config.max_failed}. "
    f"{_find_remedy(reason, config)} Replies so far are saved"
  )


def _get_status(failure: str) -> int:
  """Returns the HTTP status of a failure, 0 for another reason."""
  word = failure.removeprefix("http ").partition(":")[0]
  return int(word) if word.isdecimal() else 0


def _is_passing(failure: str) -> bool:
  return failure.startswith(PASSING) or _get_status(failure) >= 500


def _find_remedy(failure: str, config: ConfigDict) -> str:
  start = next(start for start in REMEDIES if failure.startswith(start))
  return REMEDIES[start].format(**config.to_dict())
