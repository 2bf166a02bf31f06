"""Servers of others cannot end a run, fill its memory, or learn or spread its key."""

import asyncio
import contextlib
import functools
import gzip
import socket
import threading
import time

import pytest

from tests.engine.policy import make_sampler
from tests.engine.policy import sample as sample_rollout
from tests.feedback.chat_server import Chat, completion, sends, status
from tests.feedback.terms.samples import sample
from vlmrlaif_jax.core.interrupts import Stopped
from vlmrlaif_jax.feedback import endpoint, http_client
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.feedback.server_failures import describe_error
from vlmrlaif_jax.feedback.terms.servers import request_rewards

KEY = "sk-very-secret"


@pytest.fixture
def server(http_server):
  return Chat(http_server)


@pytest.fixture
def make(server, tmp_path, monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", KEY)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")

  def make(**settings):
    config = endpoint.default_config()
    own = {"url": server.url, "model": "m", "key_env": "JUDGE_KEY", "timeout_s": 5.0}
    config.update({**own, "retries": 0, "concurrency": 1, **settings})
    return endpoint.Endpoint(config, tmp_path / "replies.jsonl")

  return make


def ask(judge, *prompts):
  return judge.ask([JudgeQuery(prompt, (), prompt) for prompt in prompts])


REPLY = completion("A reply that is read.")
BOMB = gzip.compress(gzip.compress(REPLY))  # Real ones expand to gigabytes.
HOSTILE = {
  "compressed": status(200, BOMB, Content_Encoding="gzip, gzip"),
  "brotli": status(200, BOMB, Content_Encoding="br"),
  "compressed error": status(400, BOMB, Content_Encoding="gzip, gzip"),
  "large": sends(REPLY + b" " * 2000),
  "large error": status(400, REPLY + b" " * 2000),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_reply_that_is_compressed_or_large_is_malformed(
  server, make, fault, monkeypatch
):
  monkeypatch.setattr(http_client, "MAX_REPLY_BYTES", 1500)
  server.faults = [HOSTILE[fault]]
  judge = make()
  assert ask(judge, "a", "b") == [None, "re: b"]
  assert judge.counts["failed: malformed reply"] == 1
  assert server.requests[0][0]["Accept-Encoding"] == "identity"


def test_a_reply_nested_deeply_is_malformed(server, make):
  server.faults = [sends(b"[" * 100_000), status(400, b"[" * 100_000)]
  judge = make()
  assert ask(judge, "a", "b", "c") == [None, None, "re: c"]
  assert describe_error("[" * 100_000, "").startswith("[")


START = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
  "interim replies": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
  "headers": (START, b"X: y\r\n"),
  "extension of a chunk": (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    b"x",
  ),
  "content": (START + b"Content-Length: 9999\r\n\r\n", b" "),
}


@contextlib.contextmanager
def endless_server(start, endless):
  """A server that sends bytes until the client leaves; yields its url."""

  def serve(connection):
    with connection, contextlib.suppress(OSError):
      connection.recv(65536)
      connection.sendall(start)
      while not left.wait(0.05):
        connection.sendall(endless)

  def accept():
    with contextlib.suppress(OSError):
      while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,)).start()

  left = threading.Event()
  with socket.create_server(("127.0.0.1", 0)) as listener:
    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    left.set()
    listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_exchange_with_a_judge_has_one_deadline(make, kind):
  with endless_server(*ENDLESS[kind]) as url:
    with pytest.raises(Stopped, match="timeout"):
      ask(make(url=url, timeout_s=0.5), "a")


def test_headers_of_megabytes_end_the_exchange(make):
  with endless_server(START, b"X: " + b"y" * (1 << 20)) as url:
    with pytest.raises(Stopped, match="no connection"):
      ask(make(url=url, timeout_s=20.0), "a")


@pytest.mark.parametrize("value", ["-5", "nan", "inf", "1e300", "9" * 5000, "x", ""])
def test_a_time_to_wait_that_is_wrong_is_not_waited_for(server, make, value):
  server.faults = [status(503, Retry_After=value)]
  start = time.monotonic()
  with contextlib.suppress(Stopped):  # The client does not retry after a long time.
    assert ask(make(retries=1), "a") == ["re: a"]
  assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", ["headers", "content"])
def test_an_exchange_with_a_server_of_rollouts_has_one_deadline(kind, tmp_path):
  with endless_server(*ENDLESS[kind]) as url:
    sampler = make_sampler(tmp_path, url, timeout_s=0.5, patience_s=0.1)
    with pytest.raises(Stopped, match="timeout"):
      sample_rollout(sampler)


@pytest.mark.parametrize("fault", ["compressed", "large", "deep"])
def test_replies_of_a_server_of_rollouts_have_the_same_limits(
  http_server, tmp_path, monkeypatch, fault
):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(http_client, "MAX_REPLY_BYTES", 1500)
  does = {**HOSTILE, "deep": sends(b"[" * 1400)}[fault]
  http_server.clear()
  for name in ("load_lora_adapter", "completions"):
    respond = does if name == "completions" else sends(b"loaded")
    expected = http_server.expect_request(f"/v1/{name}")
    expected.respond_with_handler(functools.partial(respond, None))
  sampler = make_sampler(tmp_path, http_server.url_for("/v1"), patience_s=0.1)
  with pytest.raises(Stopped, match="the reply|malformed"):
    sample_rollout(sampler)


def test_the_key_is_blanked_in_a_reply(server, make, tmp_path):
  server.always = sends(completion(f"My key is {KEY}."))
  assert ask(make(), "a") == ["My key is ***."]
  assert KEY not in (tmp_path / "replies.jsonl").read_text()


def test_only_the_user_reads_replies(make, tmp_path):
  ask(make(), "a")
  assert (tmp_path / "replies.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "sk-é"])
def test_a_key_that_fits_in_no_header_is_rejected(make, monkeypatch, key):
  monkeypatch.setenv("JUDGE_KEY", key)
  with pytest.raises(ValueError, match="JUDGE_KEY") as caught:
    make()
  assert key.strip() not in str(caught.value)


def test_a_key_sent_without_encryption_is_noted(make, capsys):
  make()
  assert "encryption" not in capsys.readouterr().out
  make(url="http://judge.example/v1")
  printed = capsys.readouterr().out
  assert "JUDGE_KEY" in printed and KEY not in printed


@pytest.mark.parametrize("fault", ["compressed", "large"])
def test_replies_of_a_reward_server_have_the_same_limits(server, monkeypatch, fault):
  monkeypatch.setattr(http_client, "MAX_REPLY_BYTES", 1500)
  server.faults = [HOSTILE[fault]]
  with pytest.raises(http_client.ReplyError):
    asyncio.run(request_rewards([sample()], url=f"{server.url}/chat/completions"))
