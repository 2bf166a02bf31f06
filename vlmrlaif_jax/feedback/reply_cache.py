"""Replies of a judge's server, saved as JSON lines."""

import pathlib

from vlmrlaif_jax.core import jsonl


class Replies:
  """Replies by key.

  Each process appends to its own file, because a shared disk may have no reliable
  locks. It starts with the replies of all files.

  Args:
    path: The file of process 0. Process N appends to the file with "_N" in its name.
    process: Number of this process.

  Raises:
    ValueError: This process's file is damaged or of another kind.
  """

  def __init__(self, path: pathlib.Path, process: int):
    self._path = path.with_stem(f"{path.stem}_{process}") if process else path
    self._replies: dict[str, str] = {}
    files = set(path.parent.glob(f"{path.stem}*{path.suffix}"))
    for other in sorted(files - {self._path}):
      try:
        self._replies |= _read(other)
      except (OSError, ValueError):
        continue  # Its replies are requested again.
    if self._path in files:
      self._replies |= _read(self._path)

  def get(self, key: str) -> str | None:
    """Returns the saved reply, or None."""
    return self._replies.get(key)

  def put(self, key: str, reply: str) -> None:
    """Saves a reply.

    Raises:
      OSError: The file cannot be written. The reply is known to this process alone.
    """
    self._replies[key] = reply
    jsonl.append_jsonl(self._path, [{"key": key, "reply": reply}])


def _read(path: pathlib.Path) -> dict[str, str]:
  try:
    return {row["key"]: row["reply"] for row in jsonl.read_jsonl(path)}
  except (ValueError, KeyError) as error:
    raise ValueError(
      f"{path} is not a file of replies ({error}): remove it, and its replies are "
      "requested again"
    ) from error
