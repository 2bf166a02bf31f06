"""Fields of rows that are neither a conversation nor a video: ids and other keys.

`check_fields` raises for keys that change the meaning of a record and that no stage
supports, so that a record is never trained on without them. Other unknown keys are
metadata.
"""

import math
from typing import Any

from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.formats.messages import RecordRow

ID_KEYS = ("id", "uid", "idx", "question_id", "video_id")
# Keys of a record whose weight must be 1.
WEIGHTS = (
  *("weight", "sample_weight", "loss_weight"),
  *("loss_mask", "mask", "loss_scale", "train"),
)
MAX_ID = 200  # Characters.

_SECONDS = 'name a part of the video by "start" and "end" in seconds'
_TEXT = "write it into the question, or remove it"
_WEIGHT = 'records have no weights: flag answers by "loss", or remove it'
_PAIR = "both answers must be about one video"
# Keys that change the meaning of a record if their value is not empty or false.
REJECTED = {
  **dict.fromkeys(("tools", "functions"), "the models call no tools"),
  **dict.fromkeys(("audio", "audios"), "the models read no audio"),
  **dict.fromkeys(("objects", "bbox", "bboxes", "crop"), "regions are not supported"),
  **dict.fromkeys(("rejected_images", "rejected_videos", "rejected_image"), _PAIR),
  **dict.fromkeys(("options", "choices", "candidates"), _TEXT),
  **dict.fromkeys(("context", "hint", "subtitle", "subtitles"), _TEXT),
  **dict.fromkeys(("start_frame", "end_frame", "frame_indices", "frame_idx"), _SECONDS),
  **dict.fromkeys(("tie", "is_tie"), "ties do not exist"),
  "kto_tag": "a preference requires two answers",
}
# Keys that may name a part of the video, or an event in it.
TIMES = ("timestamps", "timestamp", "segment", "clip", "span", "time", "time_range")
# Keys that are rejected if their value is of a kind; elsewhere, they are metadata.
REJECTED_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
  **dict.fromkeys(TIMES, ((list, tuple), _SECONDS)),
  "label": (bool, "a preference requires two answers"),
  "loss": ((bool, int, float), 'give "loss" in the messages'),
}


def drop_missing(row: RecordRow) -> dict[str, Any]:
  """Returns a row without the missing values of tables: None and NaN."""
  return {key: value for key, value in row.items() if not _is_missing(value)}


def _is_missing(value: Any) -> bool:
  return value is None or (isinstance(value, float) and math.isnan(value))


def read_id(row: RecordRow, default: str) -> str:
  """Returns the id of a row, or a default if it has none.

  A number without a fraction is an integer, because tables with missing values store
  integers as floats.

  Raises:
    ValueError: The id is neither a text nor a number, or too long.
  """
  key = next((key for key in ID_KEYS if row.get(key) not in (None, "")), None)
  if key is None:
    return default
  value = row[key]
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise ValueError(f'"{key}" must be a text or a number, not {value!r}')
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  name = templates.check_plain_text(str(value))
  if len(name) > MAX_ID or not name.isprintable():
    raise ValueError(f'"{key}" must be up to {MAX_ID} printable characters')
  return name


def check_fields(row: RecordRow) -> None:
  """Checks that a row has no key that changes its meaning and is not supported.

  Raises:
    ValueError: It has one.
  """
  for key, remedy in REJECTED.items():
    if row.get(key):
      raise ValueError(f'it has "{key}": {remedy}')
  for key, (kinds, remedy) in REJECTED_KINDS.items():
    if isinstance(row.get(key), kinds):
      raise ValueError(f'it has "{key}": {remedy}')
  for key in WEIGHTS:
    if row.get(key) not in (None, 1):
      raise ValueError(f'it has "{key}": {_WEIGHT}')
