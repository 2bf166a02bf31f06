"""A clip that somebody gives: whether it is one, within limits, and its features."""

import os
import pathlib
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Float

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data import video
from vlmrlaif_jax.runtime import video as run_video
from vlmrlaif_jax.serving.chat_session import ChatSession

CLIP_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".gif")
DECODE_S = 60.0  # Seconds that a clip may take to be decoded.


class ClipLimits(NamedTuple):
  """What a clip may be."""

  mb: float = 200.0
  seconds: float = 300.0


def read_clip(
  chat: ChatSession, path: str | os.PathLike, limits: ClipLimits
) -> Float[np.ndarray, "frames patches channels"]:
  """The vision tower's features of a clip.

  Raises:
    UserError: it is beyond a limit, or no video.
  """
  run, path = chat.run, pathlib.Path(path)
  check_clip(path, limits)
  # In a process of its own, which a clip may hang or crash.
  (frames,) = video.load_videos(
    [path],
    count=run.config.model.frames,
    size=run.policy.vision.image,
    workers=1,
    timeout_s=DECODE_S,
  )
  if isinstance(frames, str):
    raise _unreadable(path, frames)
  encode = run_video.make_encoder(run.policy, run.mesh)
  return np.asarray(encode(run.base, frames[None])[0]).astype(np.float16)


def check_clip(path: pathlib.Path, limits: ClipLimits) -> None:
  """Refuses what is no clip, or too large or too long a one."""
  if not path.exists():
    raise UserError(f"there is no file {path}")
  if path.suffix.lower() not in CLIP_SUFFIXES:
    kinds = " ".join(CLIP_SUFFIXES)
    raise UserError(f"{path.name} is no video by its name: take one of {kinds}")
  size = path.stat().st_size / 1e6
  if size > limits.mb:
    raise UserError(
      f"{path.name} has {size:.1f} MB, more than --max_mb={limits.mb:g}: cut it, or "
      "start with a higher limit"
    )
  length = _seconds(path)
  if length > limits.seconds:
    raise UserError(
      f"{path.name} is {length:.0f} seconds long, more than "
      f"--max_seconds={limits.seconds:g}: cut it, or start with a higher limit"
    )


def _seconds(path: pathlib.Path) -> float:
  """How long a clip says it is; 0 if it does not."""
  try:
    with av.open(str(path)) as container:
      if not container.streams.video:
        raise ValueError("it has no video stream")
      return (container.duration or 0) / av.time_base
  except (av.FFmpegError, ValueError) as error:
    reason = error.strerror if isinstance(error, av.FFmpegError) else None
    raise _unreadable(path, reason or str(error)) from error


def _unreadable(path: pathlib.Path, reason: str) -> UserError:
  return UserError(
    f"{path.name} cannot be read as a video ({reason}): it may be cut short or of "
    "another kind than its name says; take another file"
  )
