import pytest

from vlmrlaif_jax.feedback.reply_cache import Replies


@pytest.fixture
def opened(tmp_path):
  """Returns a function that opens the replies of a process by its number."""
  return lambda number: Replies(tmp_path / "made" / "replies.jsonl", number)


def test_replies_are_kept(opened):
  first = opened(0)
  first.put("a", "half of one: \ud83d")
  assert first.get("a") == "half of one: \ud83d" and first.get("b") is None
  assert opened(0).get("a") == "half of one: \ud83d"


def test_each_process_writes_a_file_of_its_own(opened, tmp_path):
  for number in range(3):
    opened(number).put("key", f"by {number}")
  names = sorted(path.name for path in (tmp_path / "made").iterdir())
  assert names == ["replies.jsonl", "replies_1.jsonl", "replies_2.jsonl"]


def test_what_another_process_kept_is_known_the_next_time(opened):
  opened(0).put("a", "of 0")
  opened(2).put("b", "of 2")
  later = opened(1)
  assert (later.get("a"), later.get("b")) == ("of 0", "of 2")


def test_what_is_there_stays_as_it_is(opened):
  opened(0).put("a", "of 0")
  opened(1).put("a", "of 1")
  assert (opened(0).get("a"), opened(1).get("a")) == ("of 0", "of 1")


@pytest.mark.parametrize("content", [b"no JSON\n", b"\xff\n", b'{"id": 1}\n', b"[]\n"])
def test_a_damaged_file_of_another_process_costs_only_its_replies(
  opened, tmp_path, content
):
  opened(0).put("a", "of 0")
  (tmp_path / "made" / "replies_1.jsonl").write_bytes(content)
  assert opened(0).get("a") == "of 0"
  with pytest.raises(ValueError, match="replies_1.jsonl"):
    opened(1)


def test_a_killed_writer_loses_its_last_reply_alone(opened, tmp_path):
  opened(0).put("a", "of 0")
  opened(0).put("b", "of 0")
  path = tmp_path / "made" / "replies.jsonl"
  path.write_bytes(path.read_bytes()[:-5])
  later = opened(0)
  assert (later.get("a"), later.get("b")) == ("of 0", None)
  later.put("c", "of 0")
  assert (opened(0).get("a"), opened(0).get("c")) == ("of 0", "of 0")


def test_a_database_of_an_earlier_version_stays_as_it_is(opened, tmp_path):
  (tmp_path / "made").mkdir()
  old = tmp_path / "made" / "replies.sqlite"
  old.write_bytes(b"SQLite format 3\n")
  opened(0).put("a", "of 0")
  assert old.read_bytes() == b"SQLite format 3\n"
