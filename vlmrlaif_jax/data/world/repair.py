"""Repair of a rendered world: damaged videos and records are written again.

hashes.json in the folder of the world has the hash of every video, of the files of
records and of those of the data set. A video depends on the seed, its split and its
index alone, so that a damaged one is rendered again by itself.
"""

import pathlib
import shutil
from collections.abc import Callable, Mapping

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.files import hash_file, read_json, write_json
from vlmrlaif_jax.data.world import builder

HASHES = "hashes.json"


def load_world(
  folder: pathlib.Path,
  *,
  sizes: Mapping[str, int],
  seed: int,
  note: Callable[[str], None] = print,
) -> None:
  """Renders the world unless it exists, and repairs what is damaged.

  Args:
    folder: Folder of the world. SPLIT.jsonl receives the records of each split.
    sizes: Videos of each split.
    seed: Seed of the scenes.
    note: Receives a line for each repaired file.
  """
  hashes = _read_hashes(folder, note)
  damaged = [name for name in hashes if hash_file(folder / name) != hashes[name]]
  for name in damaged:
    note(f"world: {folder / name} is missing or damaged: writing it again")
    _repair(folder, pathlib.Path(name), seed)
  for split, rows in _read_missing(folder, sizes, seed, note).items():
    records = sorted(rows, key=lambda row: row["id"])
    jsonl.write_records(folder / f"{split}.jsonl", records)
  if damaged or not hashes:
    names = [f"{split}.jsonl" for split in sizes]
    for pattern in ("videos/*/*.mp4", f"{builder.World.name}/*/*"):
      names += [str(path.relative_to(folder)) for path in sorted(folder.glob(pattern))]
    write_json(folder / HASHES, {name: hash_file(folder / name) for name in names})


def _repair(folder: pathlib.Path, name: pathlib.Path, seed: int) -> None:
  """Renders a damaged video; removes another damaged file, to be written again."""
  if name.suffix == ".mp4":
    builder.make_records(name.parent.name, int(name.stem), seed=seed, folder=folder)
  elif name.parts[0] == builder.World.name:
    shutil.rmtree(folder / builder.World.name, ignore_errors=True)
  else:
    (folder / name).unlink(missing_ok=True)


def _read_missing(
  folder: pathlib.Path,
  sizes: Mapping[str, int],
  seed: int,
  note: Callable[[str], None],
) -> dict[str, list[dict]]:
  """Renders the world unless it exists; returns the records of splits without a file.

  The world is rendered again if files of the data set are damaged.
  """

  def read() -> dict[str, list[dict]]:
    builder.build_world(folder, sizes=dict(sizes), seed=seed)
    missing = [split for split in sizes if not (folder / f"{split}.jsonl").exists()]
    return {split: builder.read_split(folder, split) for split in missing}

  path = folder / builder.World.name
  existed = path.exists()
  try:
    return read()
  except OSError:
    raise
  except Exception as error:  # Of several libraries that parse the files.
    if not existed:
      raise
    note(f"world: {path} is damaged ({error}): rendering the world again")
    shutil.rmtree(path)
    return read()


def _read_hashes(folder: pathlib.Path, note: Callable[[str], None]) -> dict[str, str]:
  try:
    return read_json(folder / HASHES, default={})
  except ValueError as error:
    note(f"world: {error}: its files are not checked")
    return {}
