"""The part of a video that a record is about, written behind its path.

`clip.mp4#t=1.5,3` is the part of `clip.mp4` from 1.5 s to 3 s, as in the W3C's Media
Fragments URI 1.0. One string names the part everywhere: in features, labels and the
report.
"""

import math
import re
from typing import NamedTuple

_SECONDS = r"[0-9]+(?:\.[0-9]*)?"
_FRAGMENT = re.compile(rf"#t=({_SECONDS})?(?:,({_SECONDS}))?$")


class TimeRange(NamedTuple):
  """A part of a video."""

  path: str  # Path of the whole video.
  start: float  # Seconds from the start of the video.
  end: float  # Seconds from the start of the video; infinity for its end.


def add_time_range(path: str, start: float | None, end: float | None) -> str:
  """Returns the name of a part of a video.

  >>> add_time_range("clip.mp4", 1.5, 3.0)
  'clip.mp4#t=1.5,3'

  Args:
    path: Path of the whole video.
    start: Seconds from the start of the video; None for its start.
    end: Seconds from the start of the video; None for its end.

  Raises:
    ValueError: The part is empty, or a limit is negative or not finite.
  """
  if start is None and end is None:
    return path
  limits = [limit for limit in (start, end) if limit is not None]
  if not all(math.isfinite(limit) and limit >= 0 for limit in limits):
    raise ValueError(f"start and end must be seconds >= 0, not {start} and {end}")
  if end is not None and end <= (start or 0.0):
    raise ValueError(f"end must be greater than start, not {start} and {end}")
  stop = "" if end is None else f",{_format_seconds(end)}"
  return f"{path}#t={_format_seconds(start or 0.0)}{stop}"


def _format_seconds(seconds: float) -> str:
  return f"{seconds:.6f}".rstrip("0").rstrip(".")


def split_time_range(name: str) -> TimeRange:
  """Returns the path and the limits of a name by `add_time_range`, or of a path.

  >>> split_time_range("clip.mp4#t=1.5,3")
  TimeRange(path='clip.mp4', start=1.5, end=3.0)
  """
  match = _FRAGMENT.search(name)
  if match is None:
    return TimeRange(name, 0.0, math.inf)
  start, end = match.groups()
  return TimeRange(name[: match.start()], float(start or 0), float(end or math.inf))
