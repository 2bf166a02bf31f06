"""Queries a judge on a server with OpenAI's chat completions API.

`Endpoint.ask` is the main method. A failed query has the reply None, is counted by its
reason, and is sent again in the next run. Replies are saved on disk under a hash of the
request, so no reply is paid for twice.
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

from vlmrlaif_jax.core import distributed, jsonl
from vlmrlaif_jax.core.errors import check_at_least
from vlmrlaif_jax.data.video import (
  ByCount,
  Reading,
  VideoError,
  VideoPath,
  read_video,
)
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery, ask_unique, make_query_key

# HTTP statuses that every query would receive, so that the first one raises.
FATAL_STATUSES = frozenset({301, 302, 307, 308, 401, 403, 404})
NO_KEY = {"Authorization": openai.Omit()}
MAX_WAIT_S = 8.0  # Longest wait of the client before a retry without Retry-After.


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
      temperature=0.0,
      concurrency=8,  # Concurrent requests of each process.
      timeout_s=60.0,  # Time limit of one try, without the wait before it.
      retries=5,  # Retries after 0.5, 1, 2, 4, 8, 8, ... seconds, or Retry-After.
    )
  )


class Endpoint:
  """A judge that is queried over HTTP.

  Attributes:
    counts: Number of queries by outcome: sent, answered from the cache, and failed by
      reason, as in "failed: http 500". "not saved" counts replies that are not on disk.

  Args:
    config: Settings, see default_config.
    cache: JSONL file of saved replies, see get_reply_path.

  Raises:
    ValueError: A setting is missing or out of range, or the key is not set.
  """

  def __init__(self, config: ConfigDict, cache: str | os.PathLike):
    check(config)
    self.counts: collections.Counter[str] = collections.Counter()
    self._config = config
    self._decoding = threading.Lock()
    self._path = get_reply_path(pathlib.Path(cache), distributed.process_index())
    self._replies = read_replies(pathlib.Path(cache), self._path)
    self._images = functools.lru_cache(maxsize=64)(self._encode)

  def ask(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
    """Returns the reply to each query, or None if all tries failed.

    All host processes must call this. Each sends a part of the queries.

    Raises:
      ValueError: The server rejects the key, the url or the model.
    """
    replies = ask_unique(
      lambda distinct: distributed.map_across_processes(
        lambda part: asyncio.run(self._answer_all(part)), distinct
      ),
      queries,
    )
    return [replies[make_query_key(query)] for query in queries]

  async def _answer_all(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
    config = self._config
    slots = asyncio.Semaphore(config.concurrency)
    async with openai.AsyncOpenAI(
      base_url=config.url,
      api_key=os.environ[config.key_env] if config.key_env else "none",
      max_retries=config.retries,
      timeout=config.timeout_s,
      # A server may close a reused connection while the next request is sent, which
      # would waste a retry. Uvicorn closes it after a 500.
      default_headers={"Connection": "close"},
      http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
    ) as client:

      async def answer(query: JudgeQuery) -> str | None:
        async with slots:
          return await self._answer(client, query)

      # A ValueError ends this, and asyncio.run cancels the other requests.
      return await asyncio.gather(*map(answer, queries))

  async def _answer(self, client: openai.AsyncOpenAI, query: JudgeQuery) -> str | None:
    try:
      request, key = await asyncio.to_thread(self._make_request, query)
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
      if error.status_code in FATAL_STATUSES:
        # The server's text may repeat the key, so the message omits it.
        config = self._config
        raise ValueError(
          f"{config.url} returned HTTP status {error.status_code}. Check the key in "
          f"{config.key_env or 'key_env (no key is sent)'}, the url and the model "
          f"{config.model!r}."
        ) from None
      reply, failure = None, f"http {error.status_code}"
    if reply is None:
      self.counts[f"failed: {failure}"] += 1
      return None
    self._replies[key] = reply
    try:
      jsonl.append_jsonl(self._path, [{"key": key, "reply": reply}])
    except OSError:  # For example, a full disk. The next run sends the query again.
      self.counts["not saved"] += 1
    return reply

  async def _send(
    self, client: openai.AsyncOpenAI, request: dict[str, Any]
  ) -> str | None:
    """Returns the text of the reply, or None if all replies are malformed."""
    config = self._config
    tries = config.retries + 1
    # The client limits each single read, which a slow stream of bytes never exceeds.
    limit_s = tries * config.timeout_s + config.retries * MAX_WAIT_S
    create = client.chat.completions.with_raw_response.create
    headers = {} if config.key_env else NO_KEY
    async with asyncio.timeout(limit_s):
      for _ in range(tries):  # The client itself does not retry a malformed reply.
        response = await create(**request, extra_headers=headers)
        try:
          text = json.loads(response.content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
          continue
        if isinstance(text, str):
          return text
    return None

  def _make_request(self, query: JudgeQuery) -> tuple[dict[str, Any], str]:
    """Returns the arguments of a chat completion and the hash of url and arguments."""
    config = self._config
    with self._decoding:  # The lock makes queries about one video decode it once.
      video = query.video
      key = video if isinstance(video, str | os.PathLike) else tuple(video)
      images = self._images(cast(Hashable, key))
    texts = [text for turn in query.history for text in turn] + [query.prompt]
    roles = itertools.cycle(("user", "assistant"))
    # A model may generate half of a surrogate pair, which UTF-8 cannot encode.
    texts = [text.encode(errors="replace").decode() for text in texts]
    messages = [
      {"role": role, "content": [{"type": "text", "text": text}]}
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
    return request, hashlib.sha256(sent).hexdigest()

  def _encode(self, video: VideoPath) -> tuple[str, ...]:
    """Returns the frames of a video as data URLs; () for a judge without video."""
    if video == ():
      return ()
    urls = []
    side = self._config.side
    reading = Reading(ByCount(self._config.frames), within=(side, side))
    for frame in read_video(video, reading).pixels:
      data = io.BytesIO()
      Image.fromarray(frame).save(data, format="JPEG", quality=90)
      coded = base64.b64encode(data.getvalue()).decode()
      urls.append(f"data:image/jpeg;base64,{coded}")
    return tuple(urls)


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
  check_at_least(config, {"concurrency": 1, "frames": 1, "retries": 0})
  if config.key_env and not os.environ.get(config.key_env):
    raise ValueError(
      f"the environment variable {config.key_env} is not set. Export the key of the "
      'server in it, or set key_env to "" if the server requires no key.'
    )


def get_reply_path(path: pathlib.Path, process: int) -> pathlib.Path:
  """Returns the file to which a process appends its replies.

  Each process has its own file, because locks on a shared disk may not be reliable.

  Args:
    path: File of process 0. The name of process N ends in "_N".
    process: Index of the process.
  """
  return path.with_stem(f"{path.stem}_{process}") if process else path


def read_replies(path: pathlib.Path, own: pathlib.Path) -> dict[str, str]:
  """Reads the saved replies of all processes.

  Args:
    path: File of process 0.
    own: File of this process, whose replies take precedence.

  Returns:
    Hash of the request -> reply. Damaged files of other processes are ignored.

  Raises:
    ValueError: `own` is damaged or has another format.
  """
  replies: dict[str, str] = {}
  files = path.parent.glob(f"{path.stem}*{path.suffix}")
  for file in sorted(files, key=lambda file: (file == own, file)):
    try:
      replies |= {row["key"]: row["reply"] for row in jsonl.read_jsonl(file)}
    except (OSError, ValueError, KeyError) as error:
      if file == own:
        raise ValueError(
          f"{file} is not a file of replies ({error}). Remove it to request its "
          "replies again."
        ) from error
  return replies
