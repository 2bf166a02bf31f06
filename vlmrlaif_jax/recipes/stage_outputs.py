"""The outputs of finished stages: recorded hashes, and repair of damaged ones.

done.json has the hash of each output that later stages read. A stage with a damaged
output runs again. It reads its own intact blocks and checkpoints, so that this is fast.
"""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import hash_file, read_json, write_json

# Files that a stage writes once, at its end.
OUTPUTS = ("preferences.jsonl", "rates.json", "results.json", "answers.jsonl")
DAMAGED = ".damaged"  # Suffix of files that are set aside.


def hash_outputs(folder: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of each output in a stage's folder, by name."""
  paths = (folder / name for name in OUTPUTS)
  return {path.name: hash_file(path) for path in paths if path.is_file()}


def set_damaged_aside(
  root: pathlib.Path, stages: Iterable[str], note: Callable[[str], None]
) -> None:
  """Renames damaged outputs of finished stages, which then count as unfinished.

  Args:
    root: The workdir.
    stages: Names of stages.
    note: Receives a line for each damaged file.
  """
  for stage in stages:
    path = root / stage / "done.json"
    try:
      done = read_json(path, default={})
      hashes = done.get("files", {})
    except (ValueError, AttributeError) as error:
      note(f"{path} is damaged ({error}): {stage} runs again from what it has saved")
      set_aside(path)
      continue
    now = hash_outputs(root / stage)
    wrong = [name for name in hashes if now.get(name) != hashes[name]]
    for name in wrong:
      file = root / stage / name
      note(
        f"{file} is not what {stage} wrote: it is set aside as {name}{DAMAGED}, and "
        f"{stage} writes it again from what it has saved"
      )
      set_aside(file)
    if wrong:
      path.unlink()


def forget_outputs(folder: pathlib.Path) -> None:
  """Removes recorded hashes, before a finished stage runs again and changes outputs."""
  path = folder / "done.json"
  done = read_json(path, default={})
  if "files" in done:
    write_json(path, {key: x for key, x in done.items() if key != "files"})


def set_aside(path: pathlib.Path, folder: pathlib.Path | None = None) -> None:
  """Renames a file or folder to NAME.damaged, unless it is missing.

  Args:
    path: The file or folder.
    folder: Folder to which it moves; None for its own.
  """
  folder, name = folder or path.parent, f"{path.name}{DAMAGED}"
  if path.exists():
    others = sum(each.name.startswith(name) for each in folder.iterdir())
    path.rename(folder / (f"{name}.{others}" if others else name))


def read_workdir_object(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Returns the object in a JSON file of the workdir, {} for a missing file.

  Raises:
    UserError: The file is damaged. The message ends with the remedy.
  """
  try:
    value = read_json(path, default={})
  except ValueError as error:
    raise UserError(f"{error}: {remedy}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} is damaged, because it has no object: {remedy}")
  return value
