"""The media of a row: paths of videos and images, or bytes, and a range of time.

Bytes in a row are written to a file that is named by their hash, so that each image is
stored once.
"""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmrlaif_jax.core.files import open_replacing
from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.formats.messages import Message, RecordRow
from vlmrlaif_jax.data.formats.video_files import find_video
from vlmrlaif_jax.data.time_range import add_time_range, split_time_range

VIDEO_KEYS, IMAGE_KEYS = ("video", "videos"), ("images", "image")
# Keys that name the same video where the others are absent.
PATH_KEYS = ("video_path", "image_path", "image_paths", "video_id")
TIME_KEYS = (
  ("start", "end"),
  ("video_start", "video_end"),
  ("start_time", "end_time"),
  ("clip_start", "clip_end"),
)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_CLOCK = re.compile(r"(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d+)?)")
# First bytes of files, at an index, and their suffixes.
_SIGNATURES = (
  (0, b"\xff\xd8\xff", ".jpg"),
  (0, b"\x89PNG", ".png"),
  (8, b"WEBP", ".webp"),
  (0, b"GIF8", ".gif"),
  (0, b"BM", ".bmp"),
  (4, b"ftyp", ".mp4"),
  (0, b"\x1aE\xdf\xa3", ".mkv"),
  (8, b"AVI ", ".avi"),
)


class MediaFolders(NamedTuple):
  """Folders of the videos to read, and of the bytes to write."""

  videos: Path  # Names of videos are relative to it.
  written: Path  # Bytes are written here.
  exists: Callable[[str], bool]  # Whether a path exists.
  is_allowed: Callable[[str], bool]  # Whether an existing path may be read.


class Medium(NamedTuple):
  """A video or an image of a row."""

  kind: str  # "video" or "image", by the key that names it.
  path: str | list[str]  # A list has the frames of a video.

  @property
  def is_image(self) -> bool:
    """True for a single image file, which may be a frame of a video."""
    return isinstance(self.path, str) and _is_image(self.path)


def find_media(
  row: RecordRow, messages: Sequence[Message], folders: MediaFolders
) -> list[Medium]:
  """Returns the videos and images of a row: at least one.

  Args:
    row: The row.
    messages: Its messages, whose parts may name media.
    folders: Folders of the data.

  Raises:
    ValueError: The row has no video, or one that does not exist.
  """
  media = [
    Medium(kind, _find_paths(item, folders))
    for kind, item in _list_media(row, messages)
  ]
  if not media:
    raise ValueError('it has no "video", "images" or "image"')
  start, end = _read_time_range(row, messages)
  if start is None and end is None:
    return media
  [kind, path], *others = media
  if isinstance(path, list) or _is_image(path) or os.path.isdir(path):
    raise ValueError("it has a start or an end, but frames have no time: remove them")
  if others:
    raise ValueError(
      "it has a start or an end, and several videos: name the part of each, as in "
      '"clip.mp4#t=1.5,3"'
    )
  if split_time_range(path).path != path:
    raise ValueError("it has a start or an end, and the name of its video has another")
  return [Medium(kind, add_time_range(path, start, end))]


def _is_image(path: str) -> bool:
  return path.lower().endswith(_IMAGE_SUFFIXES)


def _find_paths(item: Any, folders: MediaFolders) -> str | list[str]:
  """Returns the path of a video or an image, or of each frame of a list."""
  if not isinstance(item, list | tuple):
    return _find_path(item, folders)
  paths = [_find_path(each, folders) for each in item]
  if len(paths) == 1:
    return paths[0]
  if not paths or not all(map(_is_image, paths)):
    raise ValueError(
      f"a list of {len(paths)} files is one video, so all must be images: name several "
      'videos in one list, as in "videos": ["a.mp4", "b.mp4"]'
    )
  return paths


def _list_media(row: RecordRow, messages: Sequence[Message]) -> list[tuple[str, Any]]:
  """Returns ("video" or "image", name) of each of the row's media."""
  in_parts = [each for message in messages for each in message.media]
  beside: list[tuple[str, Any]] = []
  kinds: dict[str, tuple[str, str]]
  kinds = {"video": VIDEO_KEYS, "image": IMAGE_KEYS}
  for kind, keys in kinds.items():
    values = [row[key] for key in keys if not _is_empty(row.get(key))]
    if len(values) > 1 and values[0] not in (values[1], [values[1]]):
      raise ValueError(f'"{keys[0]}" and "{keys[1]}" differ: keep one of them')
    for value in values[:1]:
      items = value if isinstance(value, list) else [value]
      beside += [(kind, item) for item in items]
  if not beside and not in_parts:
    values = [row[key] for key in PATH_KEYS if not _is_empty(row.get(key))]
    beside = [("video", values[0])] if values else []
  sort = lambda items: sorted(items, key=lambda each: each[0], reverse=True)
  if beside and in_parts and beside != sort(in_parts):
    raise ValueError("its messages name other media than the record: keep one of them")
  return in_parts or beside


def _is_empty(value: Any) -> bool:
  """Returns whether a value names no media, as absent columns of tables do."""
  if isinstance(value, dict):
    return all(each is None for each in value.values())
  return value is None or value in ("", [], b"")


def _find_path(item: Any, folders: MediaFolders) -> str:
  """Returns the existing path of a file, after writing it if the row has its bytes."""
  if isinstance(item, dict):
    if set(item) - {"bytes", "path", "url"}:
      raise ValueError(f"a video must be a path, not an object with {sorted(item)}")
    item = item.get("bytes") or item.get("path") or item.get("url")
  if isinstance(item, bytes):
    return _write_bytes(item, folders)
  if not isinstance(item, str) or not item.strip():
    raise ValueError(f"video must be a path or a list of paths, not {item!r}")
  name = templates.check_plain_text(item)
  if name.startswith("data:"):
    return _write_bytes(_decode_base64(name), folders)
  name = name.removeprefix("file://")
  if "://" in name:
    raise ValueError(f"video must be a file, not an address: download {name}")
  path = os.path.abspath(folders.videos / name)
  whole, start, end = split_time_range(path)
  fragment = path[len(whole) :]
  if fragment:
    add_time_range(whole, start, end if end != float("inf") else None)  # Checks both.
  if not folders.exists(whole):
    # Published records may name features (.pkl), or videos without a suffix.
    parent, last = os.path.split(whole)
    whole = find_video(parent, last, last.removesuffix(".pkl"))
  if not folders.exists(whole):
    raise ValueError(f"video not found: {path}")
  if not folders.is_allowed(whole):
    raise ValueError(
      f"video {name!r} is, or has links to, a file outside of {folders.videos}: move "
      "it there, or set --config.data.allow_outside=True if you trust the records"
    )
  return whole + fragment


def _decode_base64(address: str) -> bytes:
  try:
    return base64.b64decode(address.partition(",")[2], validate=True)
  except binascii.Error as error:
    raise ValueError(f"its image is no valid base64: {error}") from None


def _write_bytes(data: bytes, folders: MediaFolders) -> str:
  """Writes the bytes of a video or an image once, and returns the path."""
  suffixes = [end for at, mark, end in _SIGNATURES if data[at:].startswith(mark)]
  if not suffixes:
    raise ValueError(f"its bytes are no known image or video: {data[:12]!r}")
  digest = hashlib.sha256(data).hexdigest()[:32]
  path = folders.written / f"{digest}{suffixes[0]}"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_replacing(path) as file:
      file.write(data)
  return os.path.abspath(path)


# Time.


def _read_time_range(
  row: RecordRow, messages: Sequence[Message]
) -> tuple[float | None, float | None]:
  """Returns the start and the end of the row's part of the video, in seconds."""
  options = {key: value for message in messages for key, value in message.options}
  spans = set()
  for source in (row, options):
    for keys in TIME_KEYS:
      start, end = (_read_seconds(key, source.get(key)) for key in keys)
      if start is not None or end is not None:
        spans.add((start, end))
  if len(spans) > 1:
    raise ValueError(f"it has several starts and ends, {sorted(map(str, spans))}")
  return spans.pop() if spans else (None, None)


def _read_seconds(key: str, value: Any) -> float | None:
  """Returns a time in seconds, which may be written as hours:minutes:seconds."""
  if value is None or value == "":
    return None
  if isinstance(value, str):
    match = _CLOCK.fullmatch(value.strip())
    if match:
      first, second, seconds = match.groups()
      hours, minutes = (first, second) if second else ("0", first or "0")
      return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'"{key}" must be a time in seconds, not {value!r}')
  return float(value)
