"""Ways to damage a file or folder of a workdir."""

import os
import pathlib
import shutil
from collections.abc import Callable

Damage = Callable[[pathlib.Path], None]


def write(content: bytes) -> Damage:
  return lambda path: path.write_bytes(content) and None


def cut(path: pathlib.Path) -> None:
  """Removes the second half."""
  os.truncate(path, path.stat().st_size // 2)


def flip(path: pathlib.Path, at: float = 0.5) -> None:
  """Changes a letter in the middle to another one."""
  content = bytearray(path.read_bytes())
  place = int(len(content) * at)
  while not content[place : place + 1].isalnum():
    place += 1
  content[place] = ord("7") if content[place] != ord("7") else ord("3")
  path.write_bytes(content)


def insert(line: bytes, after: int = 1) -> Damage:
  def damage(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:after], line + b"\n", *lines[after:]]))

  return damage


def replace_line(number: int, line: bytes) -> Damage:
  def damage(path):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line + b"\n"
    path.write_bytes(b"".join(lines))

  return damage


def remove(path: pathlib.Path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def unfinish(then: Damage) -> Damage:
  """Also removes the stage's done.json, so that the stage resumes."""

  def damage(path):
    stage = next(p for p in path.parents if (p / "stage.json").exists())
    (stage / "done.json").unlink()
    then(path)

  return damage


def damage_biggest(change: Damage) -> Damage:
  """Damages the largest file in a folder."""

  def damage(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    change(max(files, key=lambda p: p.stat().st_size))

  return damage


def remove_data(folder: pathlib.Path) -> None:
  """Removes the files of arrays in a checkpoint."""
  for path in [*folder.rglob("d")]:
    shutil.rmtree(path)
