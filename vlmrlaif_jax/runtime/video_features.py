"""Encoded videos of a run: loads and encodes their features."""

from collections.abc import Callable, Sequence

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.data import features
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.models import projector
from vlmrlaif_jax.runtime import video_encoding
from vlmrlaif_jax.runtime.run import Run


def with_features(
  run: Run, videos: Sequence[VideoPath], note: Callable[[str], None]
) -> Run:
  """The run with features of these videos, too, or with why there are none."""
  store = run.features
  todo = [
    video
    for video in videos
    if not store.has(video) and features.name_of(video) not in store.failures
  ]
  if not todo:
    return run
  made = encode_videos(run, todo, note)
  return run._replace(
    features=store._replace(
      files=store.files | made.files, failures=store.failures | made.failures
    )
  )


def encode_videos(
  run: Run,
  videos: Sequence[VideoPath],
  note: Callable[[str], None] = distributed.tell,
) -> features.Store:
  """The features of more videos than those of the splits."""
  return video_encoding.make_store(
    run.config, run.workdir, run.mesh, run.policy, run.base, videos, note, run.watch
  )


def features_of(run: Run, video: VideoPath) -> str:
  """A video by its features' name: by what it shows, not by where it lies."""
  return run.features.files[features.name_of(video)].stem


def video_tokens(run: Run, frames: int) -> int:
  """How many tokens a video of so many frames takes."""
  tower = run.policy.vision
  return projector.pooled_tokens(frames, (tower.image // tower.patch) ** 2)
