"""Repair of a rendered world: damaged videos and records are written again.

hashes.json in the folder of the world has the hash of every video and file of records.
A video depends on the seed, its split and its index alone, so that a damaged one is
rendered again by itself.
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
  _build(folder, sizes, seed, note)
  hashes = _read_hashes(folder, note)
  damaged = [name for name in hashes if hash_file(folder / name) != hashes[name]]
  for name in damaged:
    note(f"world: {folder / name} is missing or damaged: writing it again")
    path = folder / name
    if path.suffix == ".mp4":
      builder.make_records(path.parent.name, int(path.stem), seed=seed, folder=folder)
    else:
      path.unlink(missing_ok=True)
  for split in sizes:
    _write_records(folder, split, sizes, seed, note)
  if damaged or not hashes:
    names = [f"{split}.jsonl" for split in sizes]
    videos = sorted((folder / "videos").glob("*/*.mp4"))
    names += [str(path.relative_to(folder)) for path in videos]
    write_json(folder / HASHES, {name: hash_file(folder / name) for name in names})


def _build(
  folder: pathlib.Path,
  sizes: Mapping[str, int],
  seed: int,
  note: Callable[[str], None],
) -> None:
  """Renders the world; again if the files of the data set are damaged."""
  existed = (folder / builder.World.name).exists()
  try:
    builder.build_world(folder, sizes=dict(sizes), seed=seed)
  except OSError:
    raise
  except Exception as error:  # Of several libraries that parse the files.
    if not existed:
      raise
    _rebuild(folder, sizes, seed, note, error)


def _rebuild(
  folder: pathlib.Path,
  sizes: Mapping[str, int],
  seed: int,
  note: Callable[[str], None],
  error: Exception,
) -> None:
  path = folder / builder.World.name
  note(f"world: {path} is damaged ({error}): rendering the world again")
  shutil.rmtree(path)
  builder.build_world(folder, sizes=dict(sizes), seed=seed)


def _write_records(
  folder: pathlib.Path,
  split: str,
  sizes: Mapping[str, int],
  seed: int,
  note: Callable[[str], None],
) -> None:
  """Writes the records of a split unless the file exists."""
  path = folder / f"{split}.jsonl"
  if path.exists():
    return
  try:
    rows = builder.read_split(folder, split)
  except OSError:
    raise
  except Exception as error:  # Of several libraries that parse the files.
    _rebuild(folder, sizes, seed, note, error)
    rows = builder.read_split(folder, split)
  jsonl.write_records(path, sorted(rows, key=lambda row: row["id"]))


def _read_hashes(folder: pathlib.Path, note: Callable[[str], None]) -> dict[str, str]:
  try:
    return read_json(folder / HASHES, default={})
  except ValueError as error:
    note(f"world: {error}: its files are not checked")
    return {}
