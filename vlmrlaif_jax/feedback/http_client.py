"""A client of servers of others, whose replies are limited in size and time."""

import asyncio
import os
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import openai

from vlmrlaif_jax.core import distributed

MAX_REPLY_BYTES = 64 << 20
MAX_WAIT_S = 8.0  # Longest wait of the client before a retry without Retry-After.
# A reply of 300 bytes may expand to gigabytes.
UNCOMPRESSED = {"Accept-Encoding": "identity"}


class ReplyError(openai.APIConnectionError):
  """A reply that is compressed, or larger than MAX_REPLY_BYTES."""


class SlowReplyError(openai.APITimeoutError):
  """A reply whose bytes arrive so slowly that the time limit of a read is exceeded."""


def make_client(
  url: str,
  *hooks: Callable[[Any], Awaitable[None]],
  timeout_s: float,
  key: str = "",
  retries: int = 0,
) -> openai.AsyncOpenAI:
  """Returns a client that follows no redirects, and reads replies by `read_reply`.

  Args:
    url: URL of the server's API.
    hooks: Called with each response, whose content is read.
    timeout_s: Seconds of each read of one try; see `limit_exchange`.
    key: Key of the server; "" for none.
    retries: Retries of an exchange.
  """
  return openai.AsyncOpenAI(
    base_url=url,
    api_key=key or "none",
    max_retries=retries,
    timeout=timeout_s,
    # A server may close a reused connection while the next request is sent, which
    # would waste a retry. Uvicorn closes it after a 500.
    default_headers={"Connection": "close"},
    http_client=openai.DefaultAsyncHttpxClient(
      follow_redirects=False,
      headers=UNCOMPRESSED,
      event_hooks={"response": [read_reply, *hooks]},
    ),
  )


def limit_exchange(timeout_s: float, retries: int = 0) -> asyncio.Timeout:
  """Returns the time limit of an exchange with all its retries, a context manager.

  The client limits each single read, which a slow stream of bytes never exceeds.
  """
  return asyncio.timeout((retries + 1) * timeout_s + retries * MAX_WAIT_S)


async def read_reply(response: Any) -> None:
  """Reads the content of a response, of the HTTP library that openai uses or of httpx.

  Raises:
    ReplyError: The content is compressed or too large.
    SlowReplyError: The content takes longer than the time limit of a read.
  """
  encoding = response.headers.get("content-encoding", "identity")
  if encoding != "identity":
    await response.aclose()
    raise ReplyError(
      message=f"the reply is compressed ({encoding[:20]})", request=response.request
    )
  # The libraries limit each single read, which a slow stream of bytes never exceeds.
  limit_s = response.request.extensions.get("timeout", {}).get("read")
  try:
    async with asyncio.timeout(limit_s):
      content = await _read_content(response)
  except TimeoutError:
    await response.aclose()
    raise SlowReplyError(request=response.request) from None
  # Both libraries store the result of `aread` here and have no limit of their own.
  response._content = content


async def _read_content(response: Any) -> bytes:
  content = bytearray()
  async for chunk in response.aiter_raw():
    content += chunk
    if len(content) > MAX_REPLY_BYTES:
      await response.aclose()
      raise ReplyError(
        message=f"the reply has more than {MAX_REPLY_BYTES} bytes",
        request=response.request,
      )
  return bytes(content)


def check_key(variable: str) -> None:
  """Checks the key in an environment variable; "" is a server without a key.

  Raises:
    ValueError: The variable is not set, or its value cannot be a part of a header.
  """
  if not variable:
    return
  key = os.environ.get(variable, "")
  if not key:
    raise ValueError(
      f"the environment variable {variable} is not set. Export the key of the "
      'server in it, or set key_env to "" if the server requires no key.'
    )
  if not all("!" <= character <= "~" for character in key):
    raise ValueError(
      f"the environment variable {variable} contains a space, a newline or a "
      "character that is not in ASCII. Export the key of the server alone in it."
    )


def is_plain_remote(url: str) -> bool:
  """Returns whether other hosts can read what is sent to a url.

  >>> is_plain_remote("http://10.0.0.1/v1"), is_plain_remote("http://localhost:8000")
  (True, False)
  """
  parts = urllib.parse.urlsplit(url)
  return parts.scheme == "http" and not distributed.is_loopback(parts.hostname or "")
