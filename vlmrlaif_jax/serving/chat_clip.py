"""Checks and encodes the clips and images of a chat.

`read_clips` is the main function.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.decoding.files import IMAGE_SUFFIXES
from vlmrlaif_jax.data.processors.interface import Visual, mark_several, process_frames
from vlmrlaif_jax.data.time_range import split_time_range
from vlmrlaif_jax.runtime import video as run_video
from vlmrlaif_jax.serving.chat_session import ChatClip, ChatSession

CLIP_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".gif")


class ClipLimits(NamedTuple):
  """The limits of a clip."""

  max_mb: float = 200.0  # Largest file size.
  max_seconds: float = 300.0  # Largest duration.


def read_clips(
  chat: ChatSession, paths: Sequence[str | os.PathLike], limits: ClipLimits
) -> ChatClip:
  """Computes the features of clips and images, which precede the first question.

  Raises:
    UserError: A clip exceeds a limit or is neither a video nor an image, or there are
      several and the model reads one.
  """
  processor = chat.run.processor
  if len(paths) > 1 and processor.layout is not None:
    raise UserError(
      f"got {len(paths)} clips and images, but {chat.run.config.model.path} reads one. "
      "Give one, or use a model such as Qwen3-VL."
    )
  encoded, layouts = zip(*(_encode(chat, path, limits) for path in paths), strict=True)
  parts = [
    processor.arrange(*each)
    for each in zip(encoded, mark_several(layouts), strict=True)
  ]
  features = np.concatenate(parts)
  if processor.layout is not None:  # As in training. Others equal transformers.
    features = features.astype(np.float16)
  return ChatClip(features, layouts)


def _encode(
  chat: ChatSession, path: str | os.PathLike, limits: ClipLimits
) -> tuple[np.ndarray, Visual]:
  """Returns the vision tower's features of a clip or an image, and its layout."""
  run = chat.run
  check_clip(path, limits)
  reading = run.processor.make_reading("pyav")
  try:
    frames = video.read_video_in_worker(path, reading)
    processed, layout = process_frames(run.processor, frames)
  except (video.VideoError, ValueError) as error:
    reason = error.reason if isinstance(error, video.VideoError) else str(error)
    raise _make_decode_error(pathlib.Path(path), reason) from error
  size = sharding.num_batch_shards(run.mesh)
  encode = functools.partial(run_video.encode_batch, run.policy, run.base, run.mesh)
  return encode(size, [processed])[0], layout


def check_clip(clip: str | os.PathLike, limits: ClipLimits) -> None:
  """Checks that a file, or the part that its name ends in, is within the limits.

  Raises:
    UserError: The clip exceeds a limit or is not a video.
  """
  path = pathlib.Path(split_time_range(os.fspath(clip)).path)
  if not path.is_file():
    raise UserError(f"no file at {path}. Give the path of a clip.")
  suffixes = (*CLIP_SUFFIXES, *IMAGE_SUFFIXES)
  if path.suffix.lower() not in suffixes:
    raise UserError(
      f"the name of a video must end in one of {' '.join(suffixes)}, got {path.name}"
    )
  size = path.stat().st_size / 1e6
  if size > limits.max_mb:
    raise UserError(
      f"{path.name} has {size:.1f} MB, more than --max_mb={limits.max_mb:g}. Shorten "
      "the clip, or restart with a higher limit."
    )
  try:
    seconds = video.read_duration(clip)
  except video.VideoError as error:
    raise _make_decode_error(path, error.reason) from error
  if seconds > limits.max_seconds:
    raise UserError(
      f"{path.name} is {seconds:.0f} seconds long, more than "
      f"--max_seconds={limits.max_seconds:g}. Shorten the clip, or restart with a "
      "higher limit."
    )


def _make_decode_error(path: pathlib.Path, reason: str) -> UserError:
  return UserError(
    f"{path.name} cannot be read as a video ({reason}). It may be truncated, or not "
    "have the format of its name. Use another file."
  )
