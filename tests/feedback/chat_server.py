"""A server of chat completions that fails in whatever way it is told to."""

import json
import socket
import threading
import time

from werkzeug import Response

PATH = "/v1/chat/completions"


class Chat:
  """What pytest-httpserver has been asked, and what it is to do."""

  def __init__(self, http_server):
    self.url = http_server.url_for("/v1")
    self.requests, self.times = [], []
    self.now = self.most = 0  # Requests at once.
    self.faults, self.always = [], reply  # The first few times, and from then on.
    self.judge = lambda prompt: f"re: {prompt}"
    self.closing, self._lock = threading.Event(), threading.Lock()
    http_server.clear()
    asked = http_server.expect_request(PATH, method="POST")
    asked.respond_with_handler(self._answer)

  def _answer(self, request):
    with self._lock:
      self.requests.append((dict(request.headers), request.json))
      self.times.append(time.monotonic())
      self.now += 1
      self.most = max(self.most, self.now)
      does = self.faults.pop(0) if self.faults else self.always
    try:
      return does(self, request)
    finally:
      with self._lock:
        self.now -= 1


def reply(chat, request):
  prompt = request.json["messages"][-1]["content"][-1]["text"]
  return Response(completion(chat.judge(prompt)))


def completion(text):
  choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
  return json.dumps({"choices": [choice]}).encode()


def status(code, content=b"{}", **headers):
  headers = {name.replace("_", "-"): value for name, value in headers.items()}
  return lambda chat, request: Response(content, code, headers)


def sends(content):
  return status(200, content)


def stalls(chat, request):
  chat.closing.wait(20)
  return Response()


def drips(chat, request):
  spaces = (b" " for _ in range(200) if not chat.closing.wait(0.05))
  return Response(spaces, headers={"Content-Length": "1000"})


def hangs_up(chat, request):
  request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
  return Response()
