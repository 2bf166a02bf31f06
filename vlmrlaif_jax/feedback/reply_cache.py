"""What a judge's server has answered, kept on disk."""

import contextlib
import pathlib
import sqlite3
from collections.abc import Iterator

from vlmrlaif_jax.core import distributed


class Replies:
  """Replies by key, in a file that several threads may use at once.

  Each process writes a file of its own, for hosts may share a disk whose locks do not
  hold; it starts with what all have kept.

  Args:
    path: the SQLite file, made if it is not there; a later process writes beside it.

  Raises:
    ValueError: the file is of another kind, or damaged.
  """

  def __init__(self, path: pathlib.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    number = distributed.number()
    self._path = path.with_stem(f"{path.stem}_{number}") if number else path
    table = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply BLOB)"
    try:
      with _opened(self._path) as own:
        own.execute(table)
    except sqlite3.DatabaseError as error:
      raise ValueError(
        f"{self._path} cannot be read ({error}): remove it, and what it kept is asked "
        "again"
      ) from error
    others = set(path.parent.glob(f"{path.stem}*{path.suffix}")) - {self._path}
    for other in sorted(others):
      self._take(other)

  def get(self, key: str) -> str | None:
    """The reply that was kept, if one was.

    Raises:
      sqlite3.Error: the file cannot be read.
    """
    with _opened(self._path) as own:
      rows = own.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchall()
    return rows[0][0].decode(errors="surrogatepass") if rows else None

  def put(self, key: str, reply: str) -> None:
    """Keeps a reply.

    Raises:
      sqlite3.Error: the file cannot be written.
    """
    # A model may write half a character, which no text of SQLite's can hold.
    blob = reply.encode(errors="surrogatepass")
    with _opened(self._path) as own:
      own.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, blob))

  def _take(self, other: pathlib.Path) -> None:
    """What another process has kept, as far as it can be read just now."""
    with contextlib.suppress(sqlite3.Error):
      with _opened(other) as read:
        rows = read.execute("SELECT key, reply FROM replies").fetchall()
      with _opened(self._path) as own:
        own.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?)", rows)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[sqlite3.Connection]:
  """A connection is of one thread; opening one costs little beside a request."""
  connection = sqlite3.connect(path, timeout=60)
  try:
    with connection:
      yield connection
  finally:
    connection.close()
