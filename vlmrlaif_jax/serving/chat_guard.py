"""Limits of the chat page's server: who may send requests, and how much.

Any page that a browser shows can send requests to 127.0.0.1, and a name of its own may
lead there.
"""

import ipaddress
import os
import pathlib
import socket
import urllib.parse
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000  # Bytes of a request that is no upload.
UPLOAD_PATH = "/gradio_api/upload"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Gradio's page has inline scripts and styles, compiles its templates, and shows clips
# from memory.
POLICY = "; ".join(
  (
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "media-src 'self' data: blob:",
    "connect-src 'self' data: blob:",
    "font-src 'self' data:",
    "object-src 'none'",
    "base-uri 'self'",
    "form-action 'self'",
    "frame-ancestors 'none'",
  )
)
HEADERS = {
  b"content-security-policy": POLICY.encode(),
  b"referrer-policy": b"no-referrer",
  b"x-content-type-options": b"nosniff",
}


class ChatGuard:
  """Middleware that rejects requests of other sites, and large ones.

  Args:
    app: The application.
    host: Address or name that the server listens on.
    folder: Folder of the uploads.
    max_bytes: Largest size of all uploads.
  """

  def __init__(self, app: ASGIApp, host: str, folder: str, max_bytes: float):
    self.app, self.folder, self.max_bytes = app, pathlib.Path(folder), max_bytes
    self.names = {"localhost", host.lower(), socket.gethostname().lower()}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request by the application, or by an error."""
    if scope["type"] not in ("http", "websocket"):
      await self.app(scope, receive, send)
      return
    if problem := self._find_problem(scope):
      code, reason = problem
      await PlainTextResponse(reason, code)(scope, receive, send)
      return

    async def send_guarded(message: Message) -> None:
      if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], *HEADERS.items()]
      await send(message)

    await self.app(scope, receive, send_guarded)

  def _find_problem(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
    """Returns the status and the reason of a rejected request, or None."""
    headers = Headers(scope=scope)
    host = headers.get("host", "")
    if not self._is_own_host(host):
      return 400, "Open the page by its address, by localhost or by its --host."
    origin = headers.get("origin")
    is_foreign = origin is not None and urllib.parse.urlsplit(origin).netloc != host
    if scope.get("method", "") in SAFE_METHODS:
      return None
    if is_foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
      return 403, "Requests of other pages are rejected."
    if not scope["path"].rstrip("/").endswith(UPLOAD_PATH):
      length = headers.get("content-length", "")
      if not length.isdecimal():
        return 411, "A request must state its length."
      is_large = int(length) > MAX_BODY_BYTES
      return (413, "The request is too large.") if is_large else None
    files = (path for path in self.folder.rglob("*") if path.is_file())
    if sum(os.path.getsize(path) for path in files) >= self.max_bytes:
      return 507, "There are too many uploads. They are deleted after a day."
    return None

  def _is_own_host(self, host: str) -> bool:
    """Returns whether no name server of others can have led a browser here.

    Args:
      host: The header "Host", with or without a port.
    """
    try:
      name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
      return False
    try:
      ipaddress.ip_address(name)
    except ValueError:
      return name in self.names
    return True
