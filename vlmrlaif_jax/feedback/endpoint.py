"""A judge behind a server with OpenAI's chat completions API.

A query that fails has the reply None, is counted by its reason, and is requested again
in the next run. A reply is saved on disk under a hash of the request, so it is paid for
once.
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
from collections.abc import Sequence
from typing import Any

import openai
from ml_collections import ConfigDict
from PIL import Image

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.data.video import Frame, VideoError, VideoPath, decode
from vlmrlaif_jax.feedback.pairwise_judge import Query
from vlmrlaif_jax.feedback.reply_cache import Replies

# HTTP statuses that every query would receive.
REFUSALS = frozenset({301, 302, 307, 308, 401, 403, 404})
NO_KEY = {"Authorization": openai.Omit()}
LONGEST_WAIT_S = 8.0  # Of the client before a retry, without Retry-After.


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      url="",  # Up to the version: "https://api.openai.com/v1".
      model="",
      key_env="OPENAI_API_KEY",  # Environment variable of the key; "": no key is sent.
      frames=8,  # Frames per video, evenly spaced.
      side=336,  # Largest side of a frame, in pixels.
      max_tokens=256,  # Length of a reply, with the reasoning of models that reason.
      length_field="max_tokens",  # "max_completion_tokens" for OpenAI's newer models.
      temperature=0.0,
      concurrency=8,  # Requests in flight, of each process.
      timeout_s=60.0,  # Time limit of a try, without the wait before it.
      retries=5,  # After 0.5, 1, 2, 4, 8, 8, ... seconds, or as Retry-After says.
    )
  )


class Endpoint:
  """A judge that is queried over HTTP.

  Attributes:
    counts: Number of queries "asked", found in the "cache", and failed by reason, as in
      "failed: http 500", and of replies that are "not saved".

  Args:
    config: See default_config.
    cache: The JSONL file of saved replies, see Replies.

  Raises:
    ValueError: A setting is missing or out of range, or the key is not set.
  """

  def __init__(self, config: ConfigDict, cache: str | os.PathLike):
    check(config)
    self.counts: collections.Counter[str] = collections.Counter()
    self._config = config
    self._decoding = threading.Lock()
    self._replies = Replies(pathlib.Path(cache), distributed.number())
    self._images = functools.lru_cache(maxsize=64)(self._encode)

  def ask(self, queries: Sequence[Query]) -> list[str | None]:
    """Returns the reply to each query; None if all tries failed.

    All host processes call this, and each sends a part of the queries.

    Raises:
      ValueError: The server refuses the key, the url or the model.
    """
    # The id is not part of a request, so queries that differ in it alone are one.
    wanted = [query._replace(id="", video=_as_key(query.video)) for query in queries]
    distinct = list(dict.fromkeys(wanted))
    replies = distributed.spread(
      lambda part: asyncio.run(self._answer_all(part)), distinct
    )
    found = dict(zip(distinct, replies, strict=True))
    return [found[query] for query in wanted]

  async def _answer_all(self, queries: Sequence[Query]) -> list[str | None]:
    config = self._config
    free = asyncio.Semaphore(config.concurrency)
    async with openai.AsyncOpenAI(
      base_url=config.url,
      api_key=os.environ[config.key_env] if config.key_env else "none",
      max_retries=config.retries,
      timeout=config.timeout_s,
      # A server may close a kept connection (uvicorn does after a 500) just as the next
      # request is sent, which would waste a retry.
      default_headers={"Connection": "close"},
      http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
    ) as client:

      async def answer(query: Query) -> str | None:
        async with free:
          return await self._answer(client, query)

      # A ValueError ends this, and asyncio.run cancels the other requests.
      return await asyncio.gather(*map(answer, queries))

  async def _answer(self, client: openai.AsyncOpenAI, query: Query) -> str | None:
    try:
      request, key = await asyncio.to_thread(self._request, query)
      reply = self._replies.get(key)
      if reply is not None:
        self.counts["cache"] += 1
        return reply
      self.counts["asked"] += 1
      reply = await self._send(client, request)
      failure = "malformed reply"
    except VideoError:
      reply, failure = None, "video"
    except (openai.APITimeoutError, TimeoutError):
      reply, failure = None, "timeout"
    except openai.APIConnectionError:
      reply, failure = None, "no connection"
    except openai.APIStatusError as error:
      if error.status_code in REFUSALS:
        raise ValueError(_refused(error.status_code, self._config)) from None
      reply, failure = None, f"http {error.status_code}"
    if reply is None:
      self.counts[f"failed: {failure}"] += 1
    else:
      self._save(key, reply)
    return reply

  async def _send(
    self, client: openai.AsyncOpenAI, request: dict[str, Any]
  ) -> str | None:
    """Returns the text of the reply, or None if all replies are malformed."""
    config = self._config
    tries = config.retries + 1
    # The client limits each read alone, which a server that drips never exceeds.
    limit_s = tries * config.timeout_s + config.retries * LONGEST_WAIT_S
    async with asyncio.timeout(limit_s):
      for _ in range(tries):  # The client does not retry after a malformed reply.
        response = await client.chat.completions.with_raw_response.create(**request)
        text = _text_of(response.content)
        if text is not None:
          return text
    return None

  def _save(self, key: str, reply: str) -> None:
    try:
      self._replies.put(key, reply)
    except OSError:  # For example a full disk: the next run requests it again.
      self.counts["not saved"] += 1

  def _request(self, query: Query) -> tuple[dict[str, Any], str]:
    """Returns the arguments of a chat completion, and their hash with the url."""
    config = self._config
    with self._decoding:  # Queries about one video then decode it once.
      images = self._images(_as_key(query.video))
    texts = [text for turn in query.history for text in turn] + [query.prompt]
    roles = itertools.cycle(("user", "assistant"))
    messages = [
      {"role": role, "content": [{"type": "text", "text": _encodable(text)}]}
      for role, text in zip(roles, texts, strict=False)
    ]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    messages[0]["content"] = [*parts, *messages[0]["content"]]
    request = {
      "model": config.model,
      "messages": messages,
      "temperature": config.temperature,
      "extra_body": {config.length_field: config.max_tokens},
    }
    sent = json.dumps([config.url, request]).encode()
    headers = {} if config.key_env else NO_KEY
    return {**request, "extra_headers": headers}, hashlib.sha256(sent).hexdigest()

  def _encode(self, video: VideoPath) -> tuple[str, ...]:
    """Returns the frames of a video as data URLs; () for a judge without video."""
    if video == ():
      return ()
    frames = decode(video, self._config.frames)
    return tuple(_data_url(frame, self._config.side) for frame in frames)


def check(config: ConfigDict) -> None:
  parts = urllib.parse.urlsplit(config.url)
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError(
      f'url must be like "https://api.openai.com/v1", not {_without_user(parts)!r}'
    )
  if parts.username or parts.password or parts.query:
    raise ValueError(
      "url must hold no user, password or query, for it is logged: put the key in the "
      "environment and its variable in key_env"
    )
  if not config.model:
    raise ValueError("model must be the name of a model of the server, not ''")
  if config.concurrency < 1 or config.frames < 1 or config.retries < 0:
    raise ValueError(
      "concurrency and frames must be 1 or more and retries 0 or more, not "
      f"{config.concurrency}, {config.frames} and {config.retries}"
    )
  if config.key_env and not os.environ.get(config.key_env):
    raise ValueError(
      f"the environment variable {config.key_env} is not set: export the key of the "
      'server there, or set key_env to "" if it needs none'
    )


def _without_user(parts: urllib.parse.SplitResult) -> str:
  return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _refused(status: int, config: ConfigDict) -> str:
  """Returns an error message. It omits the server's text, which may repeat the key."""
  return (
    f"{config.url} answers with HTTP status {status}: check the key in "
    f"{config.key_env or 'key_env (no key is sent)'}, the url and the model "
    f"{config.model!r}"
  )


def _text_of(content: bytes) -> str | None:
  """Returns the text of a chat completion, or None if the content is not one."""
  try:
    text = json.loads(content)["choices"][0]["message"]["content"]
  except (ValueError, KeyError, IndexError, TypeError):
    return None
  return text if isinstance(text, str) else None


def _data_url(frame: Frame, side: int) -> str:
  image = Image.fromarray(frame)
  image.thumbnail((side, side), Image.Resampling.BICUBIC)
  data = io.BytesIO()
  image.save(data, format="JPEG", quality=90)
  return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _encodable(text: str) -> str:
  """Replaces half surrogate pairs, which a model may write but UTF-8 cannot encode."""
  return text.encode(errors="replace").decode()


def _as_key(video: VideoPath) -> str | tuple[str, ...]:
  """Returns the video in a form that can be hashed."""
  if isinstance(video, str | os.PathLike):
    return os.fspath(video)
  return tuple(os.fspath(image) for image in video)
