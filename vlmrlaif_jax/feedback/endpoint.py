"""Queries a judge on a server with OpenAI's chat completions API.

`Endpoint.ask` is the main method. A failed query has the reply None, is counted by its
reason, and is sent again in the next run. A server that fails every query of a batch
ends the run. Replies are saved on disk under a hash of the request, so no reply is paid
for twice.
"""

import asyncio
import base64
import collections
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import threading
import urllib.parse
from collections.abc import Hashable, Sequence
from typing import Any, cast

import openai
from ml_collections import ConfigDict
from PIL import Image

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import check_at_least
from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.video import (
  ByCount,
  Reading,
  VideoError,
  VideoPath,
  list_media,
  read_video_in_worker,
)
from vlmrlaif_jax.feedback import http_client, saved_replies, server_failures
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery, ask_unique, make_query_key
from vlmrlaif_jax.feedback.server_failures import FATAL_STATUSES, QueryOutcome

NO_KEY = {"Authorization": openai.Omit()}


def default_config() -> ConfigDict:
  """Returns the settings of a server."""
  return ConfigDict(
    dict(
      url="",  # URL up to the version: "https://api.openai.com/v1".
      model="",
      key_env="OPENAI_API_KEY",  # Environment variable of the key; "": no key is sent.
      frames=8,  # Frames per video, evenly spaced.
      side=336,  # Largest side of a frame, in pixels.
      max_tokens=256,  # Largest length of a reply, including reasoning.
      length_field="max_tokens",  # "max_completion_tokens" for OpenAI's newer models.
      # Below 0: requests have no temperature, which servers of reasoning models reject.
      temperature=0.0,
      concurrency=8,  # Concurrent requests of each process.
      timeout_s=60.0,  # Time limit of one try, without the wait before it.
      retries=5,  # Retries after 0.5, 1, 2, 4, 8, 8, ... seconds, or Retry-After.
      max_failed=0.1,  # Share of failed queries of a batch above which an alarm starts.
    )
  )


class _FatalStatusError(Exception):
  """A status that every query would receive; the message is the failure."""


class Endpoint:
  """A judge that is queried over HTTP.

  Attributes:
    counts: Number of queries by outcome: sent, answered from the cache, and failed by
      reason, as in "failed: http 500". "not saved" counts replies that are not on disk.
    failed_share: Share of the last batch's queries that failed; 0 without queries.

  Args:
    config: Settings, see default_config.
    cache: JSONL file of saved replies, see saved_replies.py. None saves nothing.

  Raises:
    ValueError: A setting is missing or out of range, or the key is not set.
  """

  def __init__(self, config: ConfigDict, cache: str | os.PathLike | None):
    check(config)
    if config.key_env and http_client.is_plain_remote(config.url):
      distributed.print_once(
        f"judge: the key in key_env={config.key_env!r} is sent without encryption to "
        f"{config.url}. Set url to an https address"
      )
    self.counts: collections.Counter[str] = collections.Counter()
    self.failed_share = 0.0
    self._config = config
    self._decoding = threading.Lock()
    self._path: pathlib.Path | None = None
    self._replies: dict[str, str] = {}
    if cache is not None:
      path, process = pathlib.Path(cache), distributed.process_index()
      self._path = saved_replies.get_reply_path(path, process)
      self._replies = saved_replies.read_replies(path, self._path)
    self._images = functools.lru_cache(maxsize=64)(self._encode)
    self._outcomes: list[QueryOutcome] = []  # Of the last batch.
    self._has_failed = self._has_replied = False  # Whether the server ever has.

  def ask(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
    """Returns the reply to each query, or None if all tries failed.

    All host processes must call this. Each sends a part of the queries.

    Raises:
      UserError: The server rejects every query, or the key, the url or the model.
      Stopped: The server is not available for any query.
    """
    replies = ask_unique(self._ask_distinct, queries)
    return [replies[make_query_key(query)] for query in queries]

  def ask_or_stop(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
    """Returns the replies of `ask`, for a stage that saves their results for good.

    Raises:
      UserError: See `ask`.
      Stopped: The server is not available for more than `max_failed` of the queries.
    """
    replies = self.ask(queries)
    server_failures.raise_if_interrupted(self._config, self._outcomes)
    return replies

  def _ask_distinct(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
    # Every process receives the outcomes of all, so that all of them end alike.
    rows = distributed.map_across_processes(
      lambda part: asyncio.run(self._answer_all(part)), queries
    )
    outcomes = [QueryOutcome(*row) for row in rows]
    self.counts.update(event for outcome in outcomes for event in outcome.events)
    self._outcomes = outcomes
    failed = [outcome for outcome in outcomes if outcome.failure]
    self.failed_share = len(failed) / max(len(outcomes), 1)
    self._has_replied |= any(each.is_new_reply() for each in outcomes)
    server_failures.raise_if_useless(self._config, outcomes, self._has_replied)
    if failed:
      line = server_failures.format_failures(outcomes, self.counts)
      limit = self._config.max_failed
      if self.failed_share > limit:
        line = f"ALARM: {line}; more than endpoint.max_failed={limit}"
      distributed.print_once(f"judge: {line}")
    return [outcome.reply for outcome in outcomes]

  def get_metrics(self) -> dict[str, float]:
    """Returns metrics of the last batch.

    "failed_queries" is the share of its queries that failed, and "failed_above_max" the
    part of it above `max_failed`, which raises the alarm "judge".
    """
    above = max(self.failed_share - self._config.max_failed, 0.0)
    return {"failed_queries": self.failed_share, "failed_above_max": above}

  async def _answer_all(self, queries: Sequence[JudgeQuery]) -> list[QueryOutcome]:
    config = self._config
    slots = asyncio.Semaphore(config.concurrency)
    async with http_client.make_client(
      config.url,
      self._note_response,
      timeout_s=config.timeout_s,
      key=self._get_key(),
      retries=config.retries,
    ) as client:

      async def answer(query: JudgeQuery) -> QueryOutcome:
        async with slots:
          return await self._answer(client, query)

      try:
        return await asyncio.gather(*map(answer, queries))
      except _FatalStatusError as error:  # asyncio.run cancels the other requests.
        return [QueryOutcome(None, str(error))] * len(queries)

  async def _answer(
    self, client: openai.AsyncOpenAI, query: JudgeQuery
  ) -> QueryOutcome:
    sent: tuple[str, ...] = ()
    try:
      request, key = await asyncio.to_thread(self._make_request, query)
      reply = self._replies.get(key)
      if reply is not None:
        return QueryOutcome(reply, "", ("cache",))
      sent = ("asked",)
      reply = await self._send(client, request)
      failure = "malformed reply"
    except VideoError as error:
      reply, failure = None, "video"
      self._note_first_failure(f"video: {error}")
    except (openai.APITimeoutError, TimeoutError):
      reply, failure = None, "timeout"
    except http_client.ReplyError as error:
      reply, failure = None, f"malformed reply: {error}"
    except openai.APIConnectionError:
      reply, failure = None, "no connection"
    except openai.APIStatusError as error:
      reply = None
      failure = self._describe_status(error.status_code, error.response.text)
      if error.status_code in FATAL_STATUSES:
        raise _FatalStatusError(failure) from None
    if reply is None:
      self._note_first_failure(failure)
      event = f"failed: {failure.partition(':')[0]}"
      return QueryOutcome(None, failure, (*sent, event))
    self._replies[key] = reply
    try:
      if self._path:
        saved_replies.append_reply(self._path, key, reply)
    except OSError:  # For example, a full disk. The next run sends the query again.
      sent += ("not saved",)
    return QueryOutcome(reply, "", sent)

  async def _note_response(self, response: Any) -> None:
    """Logs the first status that is no success, before the client retries it.

    The class of the response is that of the HTTP library that openai uses.
    """
    if not response.is_success and not self._has_failed:
      failure = self._describe_status(response.status_code, response.text)
      self._note_first_failure(failure)

  def _describe_status(self, code: int, content: str) -> str:
    """Returns the reason of a failure: the status, and the text of the server."""
    # A server may write a part of a wrong key.
    is_about_key = code in (401, 403)
    text = server_failures.describe_error(content, self._get_key())
    return f"http {code}: {text}" if text and not is_about_key else f"http {code}"

  def _get_key(self) -> str:
    """Returns the key, "" if none is sent; it is no attribute, which may be logged."""
    return os.environ[self._config.key_env] if self._config.key_env else ""

  def _note_first_failure(self, failure: str) -> None:
    """Logs the first failure of the run immediately."""
    if not self._has_failed:
      self._has_failed = True
      distributed.print_once(f"judge: first failure of {self._config.url}: {failure}")

  async def _send(
    self, client: openai.AsyncOpenAI, request: dict[str, Any]
  ) -> str | None:
    """Returns the text of the reply, or None if all replies are malformed."""
    config = self._config
    create = client.chat.completions.with_raw_response.create
    headers = {} if config.key_env else NO_KEY
    async with http_client.limit_exchange(config.timeout_s, config.retries):
      for last in (False,) * config.retries + (True,):
        try:  # The client itself does not retry a slow or malformed reply.
          response = await create(**request, extra_headers=headers)
        except http_client.SlowReplyError:
          if last:
            raise
          continue
        try:
          text = json.loads(response.content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
          continue
        if isinstance(text, str):
          key = self._get_key()  # A server may reply with it.
          return text.replace(key, "***") if key else text
    return None

  def _make_request(self, query: JudgeQuery) -> tuple[dict[str, Any], str]:
    """Returns the arguments of a chat completion and the hash of url and arguments."""
    config = self._config
    with self._decoding:  # The lock makes queries about one video decode it once.
      key = lambda x: x if isinstance(x, str | os.PathLike) else tuple(x)
      keys = [cast(Hashable, key(video)) for video in list_media(query.video)]
      videos = [self._images(key) for key in keys]
    texts = [text for turn in query.history for text in turn] + [query.prompt]
    roles = itertools.cycle(("user", "assistant"))
    # A model may generate half of a surrogate pair, which UTF-8 cannot encode.
    texts = [text.encode(errors="replace").decode() for text in texts]
    contents = _place_frames(texts, videos if query.video else None)
    messages = [
      {"role": role, "content": content}
      for role, content in zip(roles, contents, strict=False)
    ]
    request = {
      "model": config.model,
      "messages": messages,
      "temperature": config.temperature,
      "extra_body": {config.length_field: config.max_tokens},
    }
    if config.temperature < 0:
      del request["temperature"]
    sent = json.dumps([config.url, request]).encode()
    return request, hashlib.sha256(sent).hexdigest()

  def _encode(self, video: VideoPath) -> tuple[str, ...]:
    """Returns the frames of a video as data URLs; () for a judge without video."""
    if video == ():
      return ()
    urls = []
    side = self._config.side
    reading = Reading(ByCount(self._config.frames), within=(side, side))
    for frame in read_video_in_worker(video, reading).pixels:
      data = io.BytesIO()
      Image.fromarray(frame).save(data, format="JPEG", quality=90)
      coded = base64.b64encode(data.getvalue()).decode()
      urls.append(f"data:image/jpeg;base64,{coded}")
    return tuple(urls)


def _place_frames(
  texts: Sequence[str], videos: Sequence[Sequence[str]] | None
) -> list[list[dict[str, Any]]]:
  """Returns the parts of messages: texts, and frames at the places of their videos.

  Args:
    texts: Texts of the messages. Without marks, the videos precede the first one.
    videos: Data URLs of the frames of each video; None for a judge without video.
  """
  if videos is None:
    texts = [templates.show_media(text) for text in texts]
  elif not any(templates.MEDIA_MARK in text for text in texts):
    texts = [templates.MEDIA_MARK * len(videos) + texts[0], *texts[1:]]
  rest, contents = iter(videos or ()), []
  for text in texts:
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(templates.MEDIA_MARK)):
      urls = next(rest) if number else ()
      parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
      if piece:
        parts.append({"type": "text", "text": piece})
    contents.append(parts)
  return contents


def check(config: ConfigDict) -> None:
  """Checks the settings of a server.

  Raises:
    ValueError: A setting is missing or out of range, or the key is not set.
  """
  parts = urllib.parse.urlsplit(config.url)
  if parts.username or parts.password or parts.query:
    raise ValueError(
      "url must contain no user, password or query, because it is logged. Export the "
      "key in an environment variable and set key_env to its name."
    )
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError(
      f'url must be like "https://api.openai.com/v1", got {config.url!r}'
    )
  if not config.model:
    raise ValueError("model must be the name of a model of the server, got ''")
  check_at_least(config, {"concurrency": 1, "frames": 1, "retries": 0, "max_failed": 0})
  http_client.check_key(config.key_env)
