"""Saved replies: a file for each process, read by all."""

import pytest

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.feedback.endpoint import get_reply_path, read_replies


@pytest.fixture
def path(tmp_path):
  return tmp_path / "made" / "replies.jsonl"


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
def test_a_damaged_file_of_another_process_costs_only_its_replies(path, content):
  put(path, 0, "a", "of 0")
  get_reply_path(path, 1).write_bytes(content)
  assert replies(path, 0) == {"a": "of 0"}
  with pytest.raises(ValueError, match="replies_1.jsonl"):
    replies(path, 1)


def test_a_killed_writer_loses_its_last_reply_alone(path):
  put(path, 0, "a", "of 0")
  put(path, 0, "b", "of 0")
  path.write_bytes(path.read_bytes()[:-5])
  assert replies(path, 0) == {"a": "of 0"}
  put(path, 0, "c", "of 0")
  assert replies(path, 0) == {"a": "of 0", "c": "of 0"}
