"""Saved replies: a file for each process, read by all."""

import pytest

from tests.faults.damage import flip
from tests.feedback.chat_server import Chat
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.feedback.endpoint import Endpoint, default_config
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.feedback.saved_replies import get_reply_path, read_replies


@pytest.fixture
def path(tmp_path):
  return tmp_path / "made" / "replies.jsonl"


@pytest.fixture
def server(http_server, monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  return Chat(http_server)


@pytest.fixture
def make(server):
  def make(path):
    config = default_config()
    config.update({"url": server.url, "model": "m", "key_env": "", "concurrency": 1})
    return Endpoint(config, path)

  return make


def queries(*prompts):
  return [JudgeQuery(prompt, (), prompt) for prompt in prompts]


def put(path, number, key, reply):
  jsonl.append_jsonl(get_reply_path(path, number), [{"key": key, "reply": reply}])


def replies(path, number):
  return read_replies(path, get_reply_path(path, number))


def test_replies_are_kept(path):
  assert replies(path, 0) == {}
  put(path, 0, "a", "half of one: \ud83d")
  assert replies(path, 0) == {"a": "half of one: \ud83d"}


def test_each_process_writes_a_file_of_its_own(path):
  for number in range(3):
    put(path, number, "key", f"by {number}")
  names = sorted(path.name for path in path.parent.iterdir())
  assert names == ["replies.jsonl", "replies_1.jsonl", "replies_2.jsonl"]


def test_what_another_process_kept_is_known_the_next_time(path):
  put(path, 0, "a", "of 0")
  put(path, 2, "b", "of 2")
  assert replies(path, 1) == {"a": "of 0", "b": "of 2"}


def test_a_process_prefers_its_own_reply(path):
  put(path, 0, "a", "of 0")
  put(path, 1, "a", "of 1")
  assert replies(path, 0) == {"a": "of 0"} and replies(path, 1) == {"a": "of 1"}


@pytest.mark.parametrize("content", [b"no JSON\n", b"\xff\n", b'{"id": 1}\n', b"[]\n"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_file_is_named_and_costs_only_its_replies(
  path, content, number, capsys
):
  put(path, 0, "a", "of 0")
  get_reply_path(path, 1).write_bytes(content)
  assert replies(path, number) == {"a": "of 0"}
  assert "replies_1.jsonl: line 1 is damaged" in capsys.readouterr().out
  replies(path, number)  # A process repairs its own file.
  assert ("damaged" in capsys.readouterr().out) == (number == 0)


def test_a_damaged_row_is_named_and_costs_only_its_reply(server, make, path, capsys):
  whole = make(path).ask(queries("a", "b", "c"))
  flip(path, at=0.5)
  server.requests.clear()
  assert make(path).ask(queries("a", "b", "c")) == whole
  assert len(server.requests) == 1
  assert f"{path}: line 2 is damaged (the checksum differs)" in capsys.readouterr().out
  assert make(path).ask(queries("a", "b", "c")) == whole
  assert len(server.requests) == 1 and capsys.readouterr().out == ""
  assert path.stat().st_mode & 0o077 == 0


def test_replies_of_an_earlier_version_have_no_checksum_and_are_read(path):
  put(path, 0, "a", "of 0")
  assert b"crc32" not in path.read_bytes() and replies(path, 0) == {"a": "of 0"}


def test_a_killed_writer_loses_its_last_reply_alone(path):
  put(path, 0, "a", "of 0")
  put(path, 0, "b", "of 0")
  path.write_bytes(path.read_bytes()[:-5])
  assert replies(path, 0) == {"a": "of 0"}
  put(path, 0, "c", "of 0")
  assert replies(path, 0) == {"a": "of 0", "c": "of 0"}
