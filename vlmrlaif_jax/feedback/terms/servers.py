"""Terms of a judge, on a server or the policy itself, and of a reward server."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_at_least, check_choices, subsection
from vlmrlaif_jax.feedback import endpoint, http_client
from vlmrlaif_jax.feedback.pairwise_judge import AskFn, JudgeQuery, hide_videos
from vlmrlaif_jax.feedback.replies.scores import parse_score
from vlmrlaif_jax.feedback.terms.functions import Outcome
from vlmrlaif_jax.feedback.terms.sample import Sample

# "endpoint": a server with OpenAI's API; "self": the SFT policy on the devices.
TERM_JUDGES = ("endpoint", "self")
JUDGE_PROMPT = (
  "You are given a question about a video and a response to it. Rate the response from "
  "0 to {high}: is it accurate, and does it help? Be strict.\n"
  "Question: {question}\nResponse: {response}\n"
  'Write the rating as {{"score": 7}}.'
)


async def request_rewards(
  samples: Sequence[Sample], *, url: str, key_env: str = "", retries: int = 3
) -> list[float | None]:
  """Sends each sample to a reward server, whose reply is {"score": 0.5} or null.

  A request has the fields id, prompt, response, answer and record as JSON.

  Args:
    samples: Responses.
    url: URL of the server.
    key_env: Environment variable of a key that is sent as a bearer token; "" for none.
    retries: Retries of a failed connection.
  """
  headers = {"Authorization": f"Bearer {os.environ[key_env]}"} if key_env else {}
  headers |= http_client.UNCOMPRESSED
  transport = httpx.AsyncHTTPTransport(retries=retries)
  async with httpx.AsyncClient(
    headers=headers,
    timeout=None,
    transport=transport,
    event_hooks={"response": [http_client.read_reply]},
  ) as client:
    scores = []
    for sample in samples:
      names = ("id", "prompt", "response", "answer", "record")
      fields = {
        name: value for name, value in sample._asdict().items() if name in names
      }
      reply = await client.post(url, json=fields)
      reply.raise_for_status()
      scores.append(reply.json()["score"])
    return scores


class JudgeSources(NamedTuple):
  """The judges that terms may select."""

  server: ConfigDict  # Settings of a server, which the kwargs of a term override.
  # JSONL file of the server's replies. None saves nothing.
  cache: pathlib.Path | None = None
  # The SFT policy, which requires the video of each query; None if no term selects it.
  ask_self: AskFn | None = None


def read_server_settings(
  kwargs: Mapping[str, Any], server: ConfigDict, **own: Any
) -> ConfigDict:
  """Returns the settings of a term: its judge, those of a server, and its own.

  Args:
    kwargs: Settings that differ from the defaults.
    server: Defaults of the settings of the server.
    own: The term's own settings, with their defaults.

  Raises:
    ValueError: A setting is unknown. The message starts with its name.
  """
  config = server.copy_and_resolve_references().unlock()
  config.update(judge="endpoint", **own)
  for name in sorted(set(kwargs) - set(config)):
    raise ValueError(f"{name} must be one of {', '.join(sorted(config))}")
  config.update(kwargs)
  return config


def check_judge(config: ConfigDict, judges: Sequence[str] = TERM_JUDGES) -> None:
  """Checks the judge of a term.

  Args:
    config: Result of `read_server_settings`.
    judges: Values that the setting `judge` may have.

  Raises:
    ValueError: A setting is wrong. The message starts with its name.
  """
  check_choices(config, {"judge": judges})
  if config.judge == "endpoint":
    endpoint.check(config)
  if config.judge == "self" and not config.get("sees_video", True):
    raise ValueError(
      "sees_video=False requires a server, because prompts of the policy contain the "
      "video: set kwargs.judge='endpoint', or kwargs.sees_video=True"
    )


def make_ask(config: ConfigDict, sources: JudgeSources) -> AskFn:
  """Returns the judge of a term, which sees videos unless `sees_video` is False."""
  if config.judge == "self":
    return sources.ask_self or _raise_without_policy
  ask = endpoint.Endpoint(config, sources.cache).ask
  return ask if config.get("sees_video", True) else hide_videos(ask)


def _raise_without_policy(queries: Sequence[JudgeQuery]) -> list[str | None]:
  raise ValueError("kwargs.judge='self' requires a policy as `ask_self`")


# The judge.


def read_judge_settings(kwargs: Mapping[str, Any], server: ConfigDict) -> ConfigDict:
  """Returns the settings of the term `judge`, after a check.

  They are the "judge" ("endpoint" or "self"), those of a server, the "prompt" with
  {question}, {response}, {answer} and {record}, the "high" score, and "sees_video".

  Raises:
    ValueError: A setting is unknown or wrong. The message starts with "kwargs.".
  """
  with subsection("kwargs"):
    config = read_server_settings(
      kwargs, server, prompt=JUDGE_PROMPT, high=10, sees_video=True
    )
    check_judge(config)
    check_at_least(config, {"high": 1})
    if "{response}" not in config.prompt:
      raise ValueError(
        "prompt must contain {response}, which the response replaces, not "
        f"{config.prompt!r}"
      )
  return config


def make_judge_term(
  kwargs: Mapping[str, Any], sources: JudgeSources
) -> Callable[[Sequence[Sample]], list[Outcome]]:
  """Returns a function that scores samples from 0 to 1 by a judge.

  Every process must call it. Replies of a server are cached by content, so none is paid
  for twice. A reply without a score makes its sample invalid.

  Args:
    kwargs: See read_judge_settings.
    sources: The judges that may be selected.
  """
  config = read_judge_settings(kwargs, sources.server)
  ask = make_ask(config, sources)

  def score(samples: Sequence[Sample]) -> list[Outcome]:
    replies = ask([_make_judge_query(config, sample) for sample in samples])
    scores = [parse_score(reply or "", high=config.high) for reply in replies]
    return [
      Outcome(None, "the judge's reply has no score")
      if score is None
      else Outcome(score / config.high)
      for score in scores
    ]

  return score


def _make_judge_query(config: ConfigDict, sample: Sample) -> JudgeQuery:
  prompt = config.prompt.format(
    question=sample.prompt,
    response=sample.response,
    answer=sample.answer,
    record=sample.record,
    high=config.high,
  )
  return JudgeQuery(f"score:{sample.id}", sample.video, prompt)
