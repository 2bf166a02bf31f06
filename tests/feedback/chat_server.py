"""A server of chat completions that fails in whatever way it is told to."""

import http.server
import json
import time


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers as the server's next fault says, and then as its judge does."""

  protocol_version = "HTTP/1.1"

  def do_POST(self):
    said = self.server.said
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with said.lock:
      said.requests.append((self.path, dict(self.headers), body))
      said.times.append(time.monotonic())
      said.now += 1
      said.most = max(said.most, said.now)
      fault = said.faults.pop(0) if said.faults else said.always
    try:
      (fault or reply)(self, body)
    except ConnectionError:
      pass  # The client has hung up.
    finally:
      with said.lock:
        said.now -= 1

  def send(self, status, content, **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_):
    pass


def prompt_of(body):
  return body["messages"][0]["content"][-1]["text"]


def reply(handler, body):
  handler.send(200, completion(handler.server.said.judge(prompt_of(body))))


def completion(text):
  choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
  return json.dumps({"choices": [choice]}).encode()


def status(code, content=b"{}", **headers):
  return lambda handler, body: handler.send(code, content, **headers)


def sends(content):
  return status(200, content)


def stalls(handler, body):
  handler.server.said.closing.wait(20)


def drips(handler, body):
  handler.send_response(200)
  handler.send_header("Content-Length", "1000")
  handler.end_headers()
  for _ in range(200):
    handler.wfile.write(b" ")
    handler.wfile.flush()
    if handler.server.said.closing.wait(0.05):
      return


def hangs_up(handler, body):
  handler.close_connection = True
  handler.connection.close()
