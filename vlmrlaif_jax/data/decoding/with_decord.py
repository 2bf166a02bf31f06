"""Reading of frames from trusted video files by decord.

decord's frames are exact only if they are read one after another, and only in some
containers. Its wheel contains FFmpeg libraries of 2020, which crafted files can crash.
"""

import os

import numpy as np

from vlmrlaif_jax.data.decoding import containers
from vlmrlaif_jax.data.decoding.files import Choose, MakeEach, ReadFrame
from vlmrlaif_jax.data.decoding.sampling import Selection

# Containers in which tests find its frames equal to PyAV's, by PyAV's names.
EXACT_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")
_USE_PYAV = "Set data.decoder to 'pyav'."


def read_with_decord(
  path: str | os.PathLike, choose: Choose, make_each: MakeEach
) -> tuple[list[ReadFrame], Selection]:
  """Reads the selected frames of a video file; see containers.read_container.

  Raises:
    ValueError: decord may read other frames than PyAV does.
  """
  import decord  # An optional dependency.

  with containers.open_container(path) as container:
    stream = containers.find_video_stream(container)
    if container.format.name not in EXACT_FORMATS or len(container.streams.video) > 1:
      raise ValueError(
        f"decord is not exact for {container.format.name} and several streams. "
        f"{_USE_PYAV}"
      )
    if stream.sample_aspect_ratio not in (None, 1):
      raise ValueError(f"decord does not scale pixels that are not square. {_USE_PYAV}")
  timeline = containers.read_index(path).timeline
  reader = decord.VideoReader(os.fspath(path), num_threads=1)
  if len(reader) != len(timeline.seconds):
    raise ValueError(
      f"decord counts {len(reader)} frames, not {len(timeline.seconds)}. {_USE_PYAV}"
    )
  chosen = choose(timeline)
  each, selected = make_each(chosen), {}
  for number in range(max(chosen.numbers) + 1):
    frame = reader.next()
    if number in chosen.numbers:
      selected[number] = each(np.asarray(frame.asnumpy()))
  return [selected[n] for n in chosen.numbers], chosen
