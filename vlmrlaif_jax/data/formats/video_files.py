"""Files of videos that are named without their suffix, or with another case."""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

from vlmrlaif_jax.data.decoding.files import IMAGE_SUFFIXES

# Suffixes in the order of precedence. Images are videos of one frame.
SUFFIXES = (
  *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts"),
  *(".mts", ".flv", ".wmv", ".3gp", ".ogv", ".vob", ".gif"),
  *IMAGE_SUFFIXES,
)


def find_video(folder: str | os.PathLike, *names: str) -> str:
  """Returns the path of a video by its name, whatever its suffix and its case.

  Args:
    folder: Folder of videos.
    *names: Names that the file or the folder of frames may have, with or without a
      suffix. The suffix of a video does not stand for that of an image, or the reverse.
      The prefix "v_" of ActivityNet may be missing. Of a URL only the last part counts.

  Returns:
    The existing path, or the folder and the first name if none exists.

  Raises:
    ValueError: A name leads out of the folder.
  """
  root = pathlib.Path(folder)
  names = tuple(
    name.rpartition("/")[2].partition("?")[0] if "://" in name else name
    for name in names
  )
  for name in names:
    path = pathlib.Path(os.path.abspath(root / name))
    if not path.is_relative_to(os.path.abspath(root)):
      raise ValueError(f"video {name!r} must be the name of a file in {root}")
  for name in names:
    if (root / name).exists():
      return str(root / name)
  for name in names:
    parent, last = (root / name).parent, (root / name).name
    if parent.is_dir():
      index = _index_folder(parent, parent.stat().st_mtime_ns)
      for candidate in (last, f"v_{last}", last.removeprefix("v_")):
        file = _choose_file(index, candidate)
        if file:
          return str(parent / file)
  return str(root / names[0])


def is_inside(path: str, folders: Sequence[str | os.PathLike]) -> bool:
  """Returns whether a file, or a folder with all links in it, is in one of folders.

  Links are followed on both sides.
  """
  entries = os.scandir(path) if os.path.isdir(path) else ()
  links = [entry.path for entry in entries if entry.is_symlink()]
  roots = [pathlib.Path(folder).resolve() for folder in folders]
  return all(
    any(pathlib.Path(each).resolve().is_relative_to(root) for root in roots)
    for each in (path, *links)
  )


@functools.lru_cache(maxsize=64)
def _index_folder(folder: pathlib.Path, changed: int) -> dict[str, list[str]]:
  """Returns the names in a folder by their stems in lower case.

  `changed` is the time of the folder's last change, after which it is read again.
  """
  index: dict[str, list[str]] = {}
  for name in sorted(os.listdir(folder)):
    index.setdefault(_strip_suffix(name).lower(), []).append(name)
  return index


def _choose_file(index: Mapping[str, Sequence[str]], name: str) -> str | None:
  """Returns the file with the stem of a name, None for none or for several stems."""
  stem = _strip_suffix(name)
  suffix = name[len(stem) :].lower()
  is_image = lambda file: file.lower().endswith(IMAGE_SUFFIXES)
  files = [
    file
    for file in index.get(stem.lower(), ())
    if not suffix or file == _strip_suffix(file) or is_image(file) == is_image(name)
  ]
  exact = [file for file in files if _strip_suffix(file) == stem]
  stems = {_strip_suffix(file) for file in files}
  if not exact and len(stems) != 1:  # Names of YouTube differ by case alone.
    return None
  rank = lambda file: (
    not file.lower().endswith(suffix),
    [*SUFFIXES, ""].index(file[len(_strip_suffix(file)) :].lower()),
  )
  return min(exact or files, key=rank)


def _strip_suffix(name: str) -> str:
  """Returns a name without the suffix of a video or an image."""
  stem, dot, suffix = name.rpartition(".")
  return stem if dot + suffix.lower() in SUFFIXES and stem else name
