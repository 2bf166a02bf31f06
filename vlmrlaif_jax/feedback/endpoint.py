"""A judge behind any server that speaks OpenAI's chat completions.

What fails for good is None and counted, and is asked again the next time. What was
answered is kept on disk under a hash of all that was sent, so that asking again costs
nothing.
"""

import base64
import collections
import email.utils
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
from ml_collections import ConfigDict
from PIL import Image

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.data.video import Frame, VideoError, VideoPath, decode
from vlmrlaif_jax.feedback.pairwise_judge import Query
from vlmrlaif_jax.feedback.reply_cache import Replies

LONGEST_REPLY = 4_000_000  # Bytes; more than that is no chat completion.
# HTTP statuses after which a retry may help, and those that are so for every query.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
SETTINGS = frozenset({301, 302, 307, 308, 401, 403, 404})


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      url="",  # Up to the version: "https://api.openai.com/v1".
      model="",
      key_env="OPENAI_API_KEY",  # The variable that holds the key; "": it needs none.
      frames=8,  # Of each video, evenly spaced.
      side=336,  # Pixels of a frame's longer side, at most.
      max_tokens=256,  # Of a reply.
      length_field="max_tokens",  # "max_completion_tokens" for OpenAI's newer models.
      temperature=0.0,
      concurrency=8,  # Requests at once.
      timeout_s=60.0,  # For a whole reply.
      retries=4,  # After the first try.
      backoff_s=1.0,  # Before the first retry; twice as long before each later one.
      longest_wait_s=60.0,  # Before any retry, whatever the server asks for.
    )
  )


class Failed(Exception):
  """Why a query has no reply, in words that are counted."""

  def __init__(self, reason: str, *, passing: bool, wait_s: float = 0.0):
    super().__init__(reason)
    self.passing = passing  # Whether it may go well the next time.
    self.wait_s = wait_s  # How long the server wants to be left alone.


class Endpoint:
  """A judge that is asked over HTTP; `ask` is what the judges of `feedback` take.

  counts: how many queries were "asked", found in the "cache", or failed, as in
    "failed: http 500"; every "retry"; and what the cache did not keep or give.

  Args:
    config: see default_config.
    cache: the file that keeps replies, see Replies.

  Raises:
    ValueError: a setting is missing or of no use, or the key is not set.
  """

  def __init__(self, config: ConfigDict, cache: str | os.PathLike):
    check(config)
    self.counts: collections.Counter[str] = collections.Counter()
    self._config = config
    self._counting, self._decoding = threading.Lock(), threading.Lock()
    self._replies = Replies(pathlib.Path(cache))
    self._images = functools.lru_cache(maxsize=64)(self._encode)
    headers = {"Content-Type": "application/json"}
    if config.key_env:
      headers["Authorization"] = f"Bearer {os.environ[config.key_env]}"
    # Each try has a connection of its own. One that is kept may be closed by the server
    # (uvicorn does so after a 500) just as we ask again, which would waste the try.
    limits = httpx.Limits(
      max_connections=config.concurrency, max_keepalive_connections=0
    )
    self._client = httpx.Client(
      headers=headers, timeout=config.timeout_s, limits=limits
    )

  def ask(self, queries: Sequence[Query]) -> list[str | None]:
    """The reply to each query; None if there is none after all retries.

    Of several processes, which all call this, each asks a part of the queries.

    Raises:
      ValueError: the server refuses the key, the address or the model.
    """
    # What is asked does not depend on what the query is called.
    wanted = [query._replace(id="", video=_as_key(query.video)) for query in queries]
    distinct = list(dict.fromkeys(wanted))
    found = dict(
      zip(distinct, distributed.spread(self._answers, distinct), strict=True)
    )
    return [found[one] for one in wanted]

  def _answers(self, queries: Sequence[Query]) -> list[str | None]:
    with ThreadPoolExecutor(self._config.concurrency) as pool:
      # An error ends it: what has not begun by then never does.
      return list(pool.map(self._answer, queries))

  def _answer(self, query: Query) -> str | None:
    try:
      with self._decoding:  # Else all who ask about a video would decode it at once.
        images = self._images(query.video)
      body = self._body(query, images)
      key = hashlib.sha256(self._config.url.encode() + b" " + body).hexdigest()
      reply = self._kept(key)
      if reply is not None:
        self._count("cache")
        return reply
      self._count("asked")
      reply = self._with_retries(body)
      self._keep(key, reply)
      return reply
    except VideoError:
      self._count("failed: video")
    except Failed as failed:
      self._count(f"failed: {failed}")
    return None

  def _kept(self, key: str) -> str | None:
    try:
      return self._replies.get(key)
    except sqlite3.Error:
      self._count("cache: not read")
      return None

  def _keep(self, key: str, reply: str) -> None:
    try:
      self._replies.put(key, reply)
    except sqlite3.Error:  # A full disk, say: it is asked again in another run.
      self._count("cache: not written")

  def _with_retries(self, body: bytes) -> str:
    config = self._config
    for attempt in itertools.count():
      try:
        return self._post(body)
      except Failed as failed:
        if not failed.passing or attempt == config.retries:
          raise
        # Spread out, lest all that failed at once come back at once.
        wait = config.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
        self._count("retry")
        time.sleep(min(max(wait, failed.wait_s), config.longest_wait_s))

  def _post(self, body: bytes) -> str:
    try:
      status, retry_after, content = self._exchange(body)
    except (httpx.TimeoutException, TimeoutError):
      raise Failed("timeout", passing=True) from None
    except httpx.RequestError:
      raise Failed("no connection", passing=True) from None
    if status in SETTINGS:
      raise ValueError(_wrong(status, self._config))
    if status != 200:
      wait = _seconds(retry_after)
      raise Failed(f"http {status}", passing=status in PASSING, wait_s=wait)
    return _text_of(content)

  def _exchange(self, body: bytes) -> tuple[int, str, bytes]:
    """(status, header "Retry-After" or "", content) of the response."""
    url = f"{self._config.url.rstrip('/')}/chat/completions"
    stop = time.monotonic() + self._config.timeout_s
    content = bytearray()
    with self._client.stream("POST", url, content=body) as response:
      for part in response.iter_bytes():
        content += part
        # httpx minds each wait, not their sum: a server may drip.
        if time.monotonic() > stop:
          raise TimeoutError
        if len(content) > LONGEST_REPLY:
          raise Failed("reply too long", passing=False)
      retry_after = response.headers.get("Retry-After", "")
      return response.status_code, retry_after, bytes(content)

  def _body(self, query: Query, images: Sequence[str]) -> bytes:
    config = self._config
    said = [text for turn in query.history for text in turn] + [query.prompt]
    roles = itertools.cycle(("user", "assistant"))
    messages = [
      {"role": role, "content": [{"type": "text", "text": text}]}
      for role, text in zip(roles, said, strict=False)
    ]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    messages[0]["content"] = [*parts, *messages[0]["content"]]
    body = {
      "model": config.model,
      "messages": messages,
      config.length_field: config.max_tokens,
      "temperature": config.temperature,
    }
    return json.dumps(body).encode()  # ASCII: half characters survive.

  def _encode(self, video: VideoPath) -> tuple[str, ...]:
    """The frames of a video as data URLs, in order of time; () is shown none."""
    if video == ():
      return ()
    frames = decode(video, self._config.frames)
    return tuple(_data_url(frame, self._config.side) for frame in frames)

  def _count(self, what: str) -> None:
    with self._counting:
      self.counts[what] += 1


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


def _wrong(status: int, config: ConfigDict) -> str:
  """What to look at. The server's own words may repeat the key: they are not shown."""
  return (
    f"{config.url} answers with HTTP status {status}: check the key in "
    f"{config.key_env or 'key_env (none is sent)'}, the url and the model "
    f"{config.model!r}"
  )


def _text_of(content: bytes) -> str:
  """The reply in a chat completion."""
  try:
    text = json.loads(content)["choices"][0]["message"]["content"]
  except (ValueError, KeyError, IndexError, TypeError):
    text = None
  if not isinstance(text, str):
    raise Failed("malformed reply", passing=True)
  return text


def _seconds(retry_after: str) -> float:
  """Of the header: a number, or a date that may be past; 0 for neither."""
  if retry_after.isdecimal():
    return float(retry_after)
  try:
    date = email.utils.parsedate_to_datetime(retry_after)
  except ValueError:
    return 0.0
  return date.timestamp() - time.time()


def _data_url(frame: Frame, side: int) -> str:
  image = Image.fromarray(frame)
  image.thumbnail((side, side), Image.Resampling.BICUBIC)
  data = io.BytesIO()
  image.save(data, format="JPEG", quality=90)
  return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _as_key(video: VideoPath) -> str | tuple[str, ...]:
  """The video by what can be looked up."""
  if isinstance(video, str | os.PathLike):
    return os.fspath(video)
  return tuple(os.fspath(image) for image in video)
