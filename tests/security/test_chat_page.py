"""The page of the chat shows text as text, and answers its own pages only."""

import pathlib

import gradio as gr
import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from tests.helpers.browser import browsing
from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.serving import chat_page
from vlmrlaif_jax.serving.chat_clip import ClipLimits
from vlmrlaif_jax.serving.chat_guard import MAX_BODY_BYTES, UPLOAD_PATH, ChatGuard
from vlmrlaif_jax.serving.chat_session import ChatClip, ChatSession
from vlmrlaif_jax.serving.chat_stream import ChatQuestion

OWN = "127.0.0.1:7860"
JOIN = "/gradio_api/queue/join"


@pytest.fixture
def client(tmp_path):
  """A server with the limits of the page, for uploads of 100 bytes."""
  respond = lambda request: PlainTextResponse("done")
  paths = ("/", UPLOAD_PATH, JOIN)
  routes = [Route(path, respond, methods=["GET", "POST"]) for path in paths]
  settings = dict(host="0.0.0.0", folder=str(tmp_path), max_bytes=100.0)
  app = Starlette(routes=routes, middleware=[Middleware(ChatGuard, **settings)])
  return TestClient(app, headers={"host": OWN})


@pytest.mark.parametrize("host", [OWN, "localhost:1", "[::1]:7860", "10.1.2.3"])
def test_addresses_and_localhost_are_answered(client, host):
  assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["rebind.attacker.example:7860", "", "a]["])
def test_other_names_that_lead_here_are_rejected(client, host):
  assert client.get("/", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("path", [UPLOAD_PATH, JOIN])
@pytest.mark.parametrize(
  "headers",
  [
    {"origin": "http://other.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:8000"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
  ],
)
def test_other_pages_send_nothing(client, path, headers):
  assert client.post(path, headers=headers, content=b"x").status_code == 403


def test_the_page_itself_sends(client):
  headers = {"origin": f"http://{OWN}", "sec-fetch-site": "same-origin"}
  assert client.post(JOIN, headers=headers, content=b"x").text == "done"


def test_a_request_that_is_large_or_without_length_is_rejected(client):
  assert client.post(JOIN, content=b"x" * (MAX_BODY_BYTES + 1)).status_code == 413
  assert client.post(JOIN, content=iter([b"x"])).status_code == 411


def test_uploads_have_a_quota(client, tmp_path):
  assert client.post(UPLOAD_PATH, content=b"x").status_code == 200
  (tmp_path / "clip").mkdir()
  (tmp_path / "clip" / "a.mp4").write_bytes(b"x" * 100)
  assert client.post(UPLOAD_PATH, content=b"x").status_code == 507


def test_no_other_page_frames_it(client):
  policy = client.get("/").headers["content-security-policy"]
  assert "frame-ancestors 'none'" in policy and "form-action 'self'" in policy


@pytest.mark.parametrize(
  ("host", "expected"),
  [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)],
)
def test_a_public_host_is_noticed(host, expected):
  assert distributed.is_loopback(host) is expected


# The page itself.

HOSTILE = (
  "<img src='http://other.example/a.png'><b>bold</b> "
  "![x](http://other.example/b.png) ${1 + 1} {{value}} &amp;"
)
CHAT = ChatSession(None, {"sft": {}}, None, max_prompt=256)


def make_page():
  events = dict(title=HOSTILE, defaults=ChatQuestion(""))
  return chat_page.make_chat_page(CHAT, ClipLimits(), **events)


def test_uploads_are_in_a_private_folder():
  make_page()
  folder = chat_page.make_upload_folder()
  assert gr.utils.get_upload_folder() == folder
  assert pathlib.Path(folder).stat().st_mode & 0o777 == 0o700


def test_a_long_question_is_not_tokenized():
  asked = chat_page.ChatEvents(CHAT, ClipLimits())
  question = "a" * (chat_page.MAX_QUESTION + 1)
  [(rest, status, *_)] = asked.on_ask(
    question, ChatClip(np.zeros(1), ()), {"sft": []}, 0.0, 8, 1
  )
  assert len(rest) == chat_page.MAX_QUESTION and str(len(rest)) in status


def test_the_queue_is_bounded():
  page = make_page()
  chat_page.launch_page(page, host="127.0.0.1", port=0, max_mb=1.0, wait=False)
  page.close()
  assert page._queue.max_size == chat_page.MAX_WAITING


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_an_address_that_others_reach_is_noted(host, warns, capsys):
  page = make_page()
  chat_page.launch_page(page, host=host, port=0, max_mb=1.0, wait=False)
  page.close()
  assert (f"--host={host}: everyone" in capsys.readouterr().err) is warns


@pytest.fixture(scope="module")
def address():
  page = make_page()
  chat_page.launch_page(page, host="127.0.0.1", port=0, max_mb=1.0, wait=False)
  yield page.local_url.rstrip("/")
  page.close()


NAMES = ("/etc/passwd", "/proc/self/environ", "../../../../etc/passwd", "%2e%2e/passwd")
ROUTES = (
  *("/file=", "/gradio_api/file=", "/file/", "/gradio_api/file/", "/proxy=file://"),
  *("/gradio_api/stream/", "/static/", "/assets/", "/svelte/", "/custom_component/x/"),
  *("/theme.css?", "/gradio_api/proxy=file://", "/gradio_api/deep_link?a="),
)


@pytest.mark.parametrize("route", ROUTES)
def test_no_path_leads_to_a_file_or_another_server(address, route, monkeypatch):
  monkeypatch.setenv("A_KEY", "sk-very-secret")
  for name in NAMES:
    reply = httpx.get(address + route + name, follow_redirects=False)
    assert "root:" not in reply.text and "sk-very-secret" not in reply.text


@pytest.mark.parametrize(
  "route", ["/proxy=", "/gradio_api/proxy=", "/gradio_api/file="]
)
def test_the_page_is_no_proxy(address, route, http_server):
  http_server.clear()
  http_server.expect_request("/a").respond_with_data(b"secret")
  reply = httpx.get(f"{address}{route}{http_server.url_for('/a')}")
  assert http_server.log == [] and "secret" not in reply.text


def test_the_interface_is_not_described(address):
  assert httpx.get(f"{address}/openapi.json").status_code == 404


def send_clip(address, value):
  """The events of the queue after a clip was selected."""
  asked = {"data": [value], "fn_index": 0, "session_hash": "s", "trigger_id": 1}
  httpx.post(f"{address}/gradio_api/queue/join", json=asked).raise_for_status()
  url = f"{address}/gradio_api/queue/data?session_hash=s"
  return httpx.get(url, timeout=60.0).text


@pytest.fixture
def received(monkeypatch):
  """The paths of clips that the page was asked to read."""
  paths = []

  def read(chat, given, limits):
    paths.extend(given)
    raise UserError("no model")

  monkeypatch.setattr(chat_page, "read_clips", read)
  return paths


def test_an_upload_is_read(address, received, tmp_path):
  files = {"files": ("../../a b<img>.mp4", b"clip")}
  [path] = httpx.post(address + UPLOAD_PATH, files=files).json()
  send_clip(address, {"path": path, "meta": {"_type": "gradio.FileData"}})
  [own] = map(pathlib.Path, received)
  assert own.is_relative_to(chat_page.make_upload_folder())
  assert own.read_bytes() == b"clip"


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "{}/../passwd"])
def test_a_path_in_place_of_an_upload_is_rejected(address, received, path):
  path = path.format(chat_page.make_upload_folder())
  send_clip(address, {"path": path, "meta": {"_type": "gradio.FileData"}})
  assert received == []


@pytest.mark.parametrize(
  "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0"]
)
def test_a_url_in_place_of_an_upload_is_not_fetched(
  address, received, host, http_server
):
  http_server.clear()
  http_server.expect_request("/a.mp4").respond_with_data(b"clip")
  url = f"http://{host}:{http_server.port}/a.mp4"
  for value in ({"path": url}, {"path": "a.mp4", "url": url}):
    send_clip(address, {**value, "meta": {"_type": "gradio.FileData"}})
  assert http_server.log == [] and received == []


def test_titles_problems_and_answers_are_text():
  with browsing() as browser, make_page() as page:
    [messages] = chat_page.make_windows({"sft": [(HOSTILE, HOSTILE)]})
    page.load(lambda: messages, None, chat_page.make_window("hostile"))
    gr.HTML(chat_page.format_problem(HOSTILE), elem_id="problem")
    chat_page.launch_page(page, host="127.0.0.1", port=0, max_mb=1.0, wait=False)
    visit, hosts, errors = browser.new_page(), set(), []
    visit.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    is_error = lambda line: line.type == "error" and errors.append(line.text)
    visit.on("console", is_error)
    visit.goto(page.local_url)
    visit.wait_for_selector("#problem")
    for selector in (".message.bot", ".message.user", "#problem"):
      assert HOSTILE in visit.inner_text(selector)
    assert HOSTILE in visit.inner_text("body")
    assert not visit.query_selector_all("b, img[src*=other]")
    assert hosts == {page.local_url.split("/")[2]} and errors == []
  page.close()
