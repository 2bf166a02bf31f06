"""Faults of a judge's server while it labels, and the next start."""

import email.utils
import time

import pytest

from tests.faults.damage import flip
from tests.feedback.chat_server import (
  Chat,
  completion,
  drips,
  hangs_up,
  reply,
  sends,
  stalls,
  status,
)
from tests.helpers.numbered import write_numbered
from tests.stages.labeling.test_pairwise import (
  made_up_run,
  run_stage,
  scripted,
  verdict,
  written,
)
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import EXIT_USER_ERROR
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE, Stopped
from vlmrlaif_jax.recipes import machine_faults
from vlmrlaif_jax.stages.labeling import pairwise

# Distinct queries about seven pairs in both orders: six, four and two of a block.
QUERIES = 12
HTML = b"<html><body>Sign in</body></html>"


def breaks_off(chat, request):
  """Declares the length of a whole reply, and closes the connection in the middle."""
  whole = completion("Output A is better.")

  def content():
    yield whole[: len(whole) // 2]
    hangs_up(chat, request)

  response = status(200)(chat, request)
  response.headers["Content-Length"] = str(len(whole))
  response.response = content()
  return response


def date_in(seconds):
  return email.utils.formatdate(time.time() + seconds, usegmt=True)


# The client does not wait for longer than two minutes.
LASTING = {
  "429": status(429),
  "429, Retry-After in hours": status(429, Retry_After="9999"),
  "429, Retry-After is in years": status(429, Retry_After=date_in(9e8)),
  "503": status(503),
  "no bytes": stalls,
  "a reset in the middle": breaks_off,
}
PASSING = {
  "429": status(429),
  "429, Retry-After in seconds": status(429, Retry_After="1"),
  "429, Retry-After is a date": status(429, Retry_After=date_in(1)),
  "429, Retry-After is past": status(429, Retry_After=date_in(-9e8)),
  "429, Retry-After is infinite": status(429, Retry_After="inf"),
  "429, Retry-After is no number": status(429, Retry_After="soon"),
  "429, Retry-After is below 0": status(429, Retry_After="-3"),
  "429, Retry-After is NaN": status(429, Retry_After="nan"),
  "500": status(500, HTML),
  "502": status(502, HTML),
  "503": status(503),
  "HTML with 200": sends(HTML),
  "no bytes": stalls,
  "drops of bytes": drips,
  "a reset before the reply": hangs_up,
  "a reset in the middle": breaks_off,
  "half of the JSON": sends(completion("yes")[:-9]),
  "content: null": sends(completion(None)),
  "no choices": sends(b'{"choices": []}'),
}


def make_chat(http_server):
  made = Chat(http_server)
  made.judge = lambda prompt: verdict(prompt).text
  return made


@pytest.fixture
def chat(http_server):
  made = make_chat(http_server)
  yield made
  made.closing.set()


@pytest.fixture(scope="module", autouse=True)
def _scripted_answers():
  """Answers without a model, and waits before retries that are short."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(pairwise.answering, "answer_requests", scripted([]))
    patch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    patch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    yield


def make_run(workdir, url, **settings):
  """A run whose answers are scripted, and whose judge is the server."""
  run = made_up_run(workdir, judge="endpoint", context="none")
  for path in run.features.files:
    write_numbered(path, frames=3)
  run.config.label.endpoint.update(
    {"url": url, "model": "m", "key_env": "", "frames": 1, "side": 16,
     "retries": 1, "concurrency": 1, "timeout_s": 0.4, **settings}
  )  # fmt: skip
  return run


@pytest.fixture(scope="module")
def whole(http_server, tmp_path_factory):
  """The labels of a run without faults."""
  chat = make_chat(http_server)
  run = make_run(tmp_path_factory.mktemp("whole"), chat.url)
  assert start(run) == (0, "") and len(chat.requests) == QUERIES
  return read(run)


def start(run):
  """Runs the stage; returns (exit code, message) as the program has them."""
  try:
    run_stage(run)
  except Stopped as stopped:
    return EXIT_RESUMABLE, str(stopped)
  except Exception as error:
    failure = machine_faults.describe_failure(error, run.workdir)
    if failure is None:
      raise
    return failure[::-1]
  return 0, ""


def read(run):
  """The labels, without the workdir in the names of videos."""
  return {
    name: content.replace(str(run.workdir).encode(), b"W")
    for name, content in written(run).items()
    if "blocks" not in name
  }


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_no_row(whole, chat, tmp_path, fault):
  run = make_run(tmp_path, chat.url)
  chat.faults = [reply] * 3 + [PASSING[fault]] + [reply] * 5 + [PASSING[fault]]
  assert start(run) == (0, "")
  assert read(run) == whole and len(chat.requests) == QUERIES + 2


@pytest.mark.parametrize(
  "fault, answered",
  [*((fault, 3) for fault in LASTING), *(("503", count) for count in (0, 5, 6, 11))],
)
def test_a_server_that_fails_from_a_query_on_stops_the_run_and_costs_no_row(
  whole, chat, tmp_path, fault, answered
):
  run = make_run(tmp_path, chat.url, retries=0)
  good = chat.always
  chat.faults, chat.always = [reply] * answered, LASTING[fault]
  code, message = start(run)
  assert code == EXIT_RESUMABLE and chat.url in message
  assert "Replies so far are saved" in message
  chat.requests.clear()
  chat.always = good
  assert start(run) == (0, "") and read(run) == whole
  assert len(chat.requests) == QUERIES - answered


def test_a_server_that_fails_now_and_then_costs_only_its_rows(
  whole, chat, tmp_path, capsys
):
  run = make_run(tmp_path, chat.url, retries=0, max_failed=0.2)
  chat.faults = [reply, reply, status(503)]
  assert start(run) == (0, "")
  blocks = run.workdir / "label" / "blocks"
  lost = [
    row["id"]
    for path in sorted(blocks.iterdir())
    for row in jsonl.read_jsonl(path)
    if row["outcome"] == "too_long"
  ]
  assert lost == ["fooled", "long_question"]
  assert "1 of 6 queries failed (1 http 503)" in capsys.readouterr().out


@pytest.mark.parametrize(
  "fault, words",
  [
    (status(400, b'{"error": "At most 1 image"}'), "http 400: At most 1 image"),
    (status(401), "http 401). Check the key"),
    (status(404), "http 404). Check url="),
    (sends(HTML), "malformed reply). Check that url="),
    (sends(completion(None)), "raise max_tokens=256"),
  ],
)
def test_a_server_that_rejects_all_queries_ends_the_run_with_its_reason(
  whole, chat, tmp_path, fault, words
):
  run = make_run(tmp_path, chat.url, retries=0)
  good, chat.always = chat.always, fault
  code, message = start(run)
  assert code == EXIT_USER_ERROR and words in message and "\n" not in message
  chat.always = good
  assert start(run) == (0, "") and read(run) == whole


def test_a_server_that_cannot_be_reached_stops_the_run(tmp_path):
  code, message = start(make_run(tmp_path, "http://127.0.0.1:9/v1", retries=0))
  assert code == EXIT_RESUMABLE
  assert "no connection" in message and "Start the server, or correct url" in message


def test_a_damaged_reply_is_the_only_one_that_is_requested_again(
  whole, chat, tmp_path, capsys
):
  run = make_run(tmp_path, chat.url)
  start(run)
  chat.requests.clear()
  flip(run.workdir / "endpoint.jsonl")
  for path in (run.workdir / "label" / "blocks").iterdir():
    path.unlink()
  assert start(run) == (0, "") and read(run) == whole
  assert len(chat.requests) == 1
  assert "endpoint.jsonl: line 6 is damaged" in capsys.readouterr().out
