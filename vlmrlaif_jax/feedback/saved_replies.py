"""Replies of servers on disk, by the hash of the request."""

import pathlib

from vlmrlaif_jax.core import distributed, jsonl

PRIVATE = 0o600  # Mode of files that only their user may read.


def append_reply(path: pathlib.Path, key: str, reply: str) -> None:
  """Appends a reply with its checksum.

  Args:
    path: File of this process, see get_reply_path.
    key: Hash of the request.
    reply: Text of the reply.
  """
  row = jsonl.seal_row({"key": key, "reply": reply})
  jsonl.append_jsonl(path, [row], mode=PRIVATE)


def get_reply_path(path: pathlib.Path, process: int) -> pathlib.Path:
  """Returns the file to which a process appends its replies.

  Each process has its own file, because locks on a shared disk may not be reliable.

  Args:
    path: File of process 0. The name of process N ends in "_N".
    process: Index of the process.
  """
  return path.with_stem(f"{path.stem}_{process}") if process else path


def read_replies(path: pathlib.Path, own: pathlib.Path) -> dict[str, str]:
  """Reads the saved replies of all processes.

  A line names a damaged file. Its intact replies are returned.

  Args:
    path: File of process 0.
    own: File of this process, whose replies take precedence. Damaged rows are removed
      from it.

  Returns:
    Hash of the request -> reply. Unreadable files of other processes are ignored.

  Raises:
    OSError: `own` exists and cannot be read.
  """
  replies: dict[str, str] = {}
  files = path.parent.glob(f"{path.stem}*{path.suffix}")
  for file in sorted(files, key=lambda file: (file == own, file)):
    try:
      rows, damaged = jsonl.read_intact_rows(file)
    except OSError:
      if file == own:
        raise
      continue
    complete = [
      row for row in rows if isinstance(row.get("reply"), str) and "key" in row
    ]
    if damaged or len(complete) < len(rows):
      why = jsonl.format_damage(file, damaged or {1: "it is no reply"})
      distributed.print_once(f"judge: {why}: its queries are sent again")
      if file == own:
        jsonl.write_records(file, map(jsonl.seal_row, complete), mode=PRIVATE)
    replies |= {row["key"]: row["reply"] for row in complete}
  return replies
