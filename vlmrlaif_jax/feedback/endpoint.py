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
from collections.abc import Hashable, Sequence
from typing import Any, cast

import openai
from ml_collections import ConfigDict
from PIL import Image

from vlmrlaif_jax.core import distributed, jsonl
from vlmrlaif_jax.core.errors import check_at_least
from vlmrlaif_jax.data.video import VideoError, VideoPath, decode_video
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery, ask_unique, make_query_key

# HTTP statuses that every query would receive.
REFUSALS = frozenset({301, 302, 307, 308, 401, 403, 404})
NO_KEY = {"Authorization": openai.Omit()}
MAX_WAIT_S = 8.0  # Of the client before a retry, without Retry-After.


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
    cache: The JSONL file of saved replies, see reply_file.

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
    """Returns the reply to each query; None if all tries failed.

    All host processes call this, and each sends a part of the queries.

    Raises:
      ValueError: The server refuses the key, the url or the model.
    """
    found = ask_unique(
      lambda distinct: distributed.map_across_processes(
        lambda part: asyncio.run(self._answer_all(part)), distinct
      ),
      queries,
    )
    return [found[make_query_key(query)] for query in queries]

  async def _answer_all(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
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

      async def answer(query: JudgeQuery) -> str | None:
        async with free:
          return await self._answer(client, query)

      # A ValueError ends this, and asyncio.run cancels the other requests.
      return await asyncio.gather(*map(answer, queries))

  async def _answer(self, client: openai.AsyncOpenAI, query: JudgeQuery) -> str | None:
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
        # The server's text may repeat the key, so it is left out.
        config = self._config
        raise ValueError(
          f"{config.url} answers with HTTP status {error.status_code}: check the key "
          f"in {config.key_env or 'key_env (no key is sent)'}, the url and the model "
          f"{config.model!r}"
        ) from None
      reply, failure = None, f"http {error.status_code}"
    if reply is None:
      self.counts[f"failed: {failure}"] += 1
      return None
    self._replies[key] = reply
    try:
      jsonl.append_jsonl(self._path, [{"key": key, "reply": reply}])
    except OSError:  # For example a full disk: the next run requests it again.
      self.counts["not saved"] += 1
    return reply

  async def _send(
    self, client: openai.AsyncOpenAI, request: dict[str, Any]
  ) -> str | None:
    """Returns the text of the reply, or None if all replies are malformed."""
    config = self._config
    tries = config.retries + 1
    # The client limits each read alone, which a server that drips never exceeds.
    limit_s = tries * config.timeout_s + config.retries * MAX_WAIT_S
    create = client.chat.completions.with_raw_response.create
    headers = {} if config.key_env else NO_KEY
    async with asyncio.timeout(limit_s):
      for _ in range(tries):  # The client does not retry after a malformed reply.
        response = await create(**request, extra_headers=headers)
        try:
          text = json.loads(response.content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
          continue
        if isinstance(text, str):
          return text
    return None

  def _request(self, query: JudgeQuery) -> tuple[dict[str, Any], str]:
    """Returns the arguments of a chat completion, and their hash with the url."""
    config = self._config
    with self._decoding:  # Queries about one video then decode it once.
      video = query.video
      key = video if isinstance(video, str | os.PathLike) else tuple(video)
      images = self._images(cast(Hashable, key))
    texts = [text for turn in query.history for text in turn] + [query.prompt]
    roles = itertools.cycle(("user", "assistant"))
    # A model may write half of a surrogate pair, which UTF-8 cannot encode.
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
    for frame in decode_video(video, self._config.frames):
      image = Image.fromarray(frame)
      image.thumbnail((self._config.side,) * 2, Image.Resampling.BICUBIC)
      data = io.BytesIO()
      image.save(data, format="JPEG", quality=90)
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
      "url must hold no user, password or query, for it is logged: put the key in the "
      "environment and its variable in key_env"
    )
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError(
      f'url must be like "https://api.openai.com/v1", not {config.url!r}'
    )
  if not config.model:
    raise ValueError("model must be the name of a model of the server, not ''")
  check_at_least(config, {"concurrency": 1, "frames": 1, "retries": 0})
  if config.key_env and not os.environ.get(config.key_env):
    raise ValueError(
      f"the environment variable {config.key_env} is not set: export the key of the "
      'server there, or set key_env to "" if it needs none'
    )


def get_reply_path(path: pathlib.Path, process: int) -> pathlib.Path:
  """Returns the file that a process appends its replies to.

  Each has its own, because a shared disk may have no reliable locks: process 0 the
  given one, and process N one with "_N" in its name.
  """
  return path.with_stem(f"{path.stem}_{process}") if process else path


def read_replies(path: pathlib.Path, own: pathlib.Path) -> dict[str, str]:
  """Returns the saved replies of all processes by key; those of `own` come first.

  Args:
    path: The file of process 0.
    own: The file of this process.

  Raises:
    ValueError: `own` is damaged or of another kind. Other such files are left out, so
      their replies are requested again.
  """
  replies: dict[str, str] = {}
  files = path.parent.glob(f"{path.stem}*{path.suffix}")
  for file in sorted(files, key=lambda file: (file == own, file)):
    try:
      replies |= {row["key"]: row["reply"] for row in jsonl.read_jsonl(file)}
    except (OSError, ValueError, KeyError) as error:
      if file == own:
        raise ValueError(
          f"{file} is not a file of replies ({error}): remove it, and its replies are "
          "requested again"
        ) from error
  return replies
