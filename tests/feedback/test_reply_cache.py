import pytest

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.feedback.reply_cache import Replies


@pytest.fixture
def opened(tmp_path, monkeypatch):
  """The replies of the process of this number."""

  def open_as(number):
    monkeypatch.setattr(distributed, "number", lambda: number)
    return Replies(tmp_path / "made" / "replies.sqlite")

  return open_as


def test_replies_are_kept(opened):
  first = opened(0)
  first.put("a", "half of one: \ud83d")
  assert first.get("a") == "half of one: \ud83d" and first.get("b") is None
  assert opened(0).get("a") == "half of one: \ud83d"


def test_each_process_writes_a_file_of_its_own(opened, tmp_path):
  for number in range(3):
    opened(number).put("key", f"by {number}")
  names = sorted(path.name for path in (tmp_path / "made").iterdir())
  assert names == ["replies.sqlite", "replies_1.sqlite", "replies_2.sqlite"]


def test_what_another_process_kept_is_known_the_next_time(opened):
  opened(0).put("a", "of 0")
  opened(2).put("b", "of 2")
  later = opened(1)
  assert (later.get("a"), later.get("b")) == ("of 0", "of 2")


def test_what_is_there_stays_as_it_is(opened):
  opened(0).put("a", "of 0")
  opened(1).put("a", "of 1")
  assert (opened(0).get("a"), opened(1).get("a")) == ("of 0", "of 1")


def test_a_damaged_file_of_another_process_costs_only_what_it_kept(opened, tmp_path):
  opened(0).put("a", "of 0")
  (tmp_path / "made" / "replies_1.sqlite").write_bytes(b"no database" * 100)
  assert opened(0).get("a") == "of 0"


def test_an_own_damaged_file_is_refused_with_the_remedy(opened, tmp_path):
  (tmp_path / "made").mkdir()
  (tmp_path / "made" / "replies.sqlite").write_bytes(b"no database" * 100)
  with pytest.raises(ValueError, match="replies.sqlite cannot be read .* remove it"):
    opened(0)
