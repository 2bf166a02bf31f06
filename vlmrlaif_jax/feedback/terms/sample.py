"""The sample that the functions of reward terms receive."""

import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.video import (
  ByCount,
  Frames,
  Media,
  Reading,
  VideoPath,
  list_media,
  read_video_in_worker,
)

CACHED_VIDEOS = 64  # Videos whose frames stay in memory.


class Sample(NamedTuple):
  """A response to a prompt, with everything that a function may score it by.

  The samples of one prompt are adjacent.
  """

  id: str  # Id of the record.
  prompt: str  # Question of the record; "<video>" marks a video inside of it.
  response: str  # Text without EOS.
  tokens: tuple[int, ...]  # Ids of the response, with EOS if it has one.
  stopped: bool  # Whether the response ends with EOS.
  max_tokens: int  # Largest number of tokens of a response.
  answer: str  # Reference answer of the record; "" without one.
  record: Mapping[str, Any]  # All fields of the record.
  video: Media  # Path of the video, or paths of its frames.
  seed: int  # Depends on the run's seed, the id and the response only.

  def read_frames(self, count: int = 8, side: int = 512) -> list[Frames]:
    """Decodes evenly spaced frames of each video, with their times in seconds.

    Args:
      count: Largest number of frames of a video.
      side: Largest height and width of a frame, in pixels. Larger ones are shrunk.

    Raises:
      VideoError: A video cannot be read.
    """
    reading = Reading(ByCount(count), within=(side, side))
    return [_read_cached(_freeze(path), reading) for path in list_media(self.video)]


def make_example(sample: Sample) -> Example:
  """Returns the example whose response a sample is, without the other fields."""
  return {
    "id": sample.id,
    "video": cast(Any, sample.video),  # As in the record.
    "question": sample.prompt,
    "answer": sample.answer,
    "source": "",
    "turns": [],
  }


def make_seed(seed: int, id: str, response: str) -> int:
  """Returns the seed of a sample, from 0 to 2**32 - 1."""
  text = f"{seed}\0{id}\0{response}"
  return zlib.crc32(text.encode(errors="backslashreplace"))


def _freeze(path: VideoPath) -> Any:
  """Returns a path that can be a key of a cache."""
  return tuple(path) if isinstance(path, list) else path


@functools.lru_cache(maxsize=CACHED_VIDEOS)
def _read_cached(path: Any, reading: Reading) -> Frames:
  return read_video_in_worker(path, reading)
