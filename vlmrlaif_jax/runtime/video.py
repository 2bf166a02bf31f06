"""Encodes the videos of a run with its vision tower and saves their features."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.files import find_differences
from vlmrlaif_jax.core.profiling import PhaseTimer, format_shares
from vlmrlaif_jax.core.types import AnyArray, Params
from vlmrlaif_jax.data import features, records, tokenization
from vlmrlaif_jax.data.processors.interface import (
  ProcessedVideo,
  Processor,
  count_features,
  lay_out,
)
from vlmrlaif_jax.data.records import Example, PreferenceExample, SkippedRecord
from vlmrlaif_jax.data.video import Media, VideoPath, format_video_name, list_media
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime.run import Run

LENGTH_MULTIPLE = 64  # Features are padded to a multiple of this number.
VIDEOS_PER_DEVICE = 32  # Minimum number of videos in a batch of the encoder.
# Videos whose pixels are in memory, if they differ in size. Their temporal patches are
# batched instead.
VIDEOS_IN_MEMORY = 4


def encode_videos(run: Run, rows: Sequence[Media], note: Callable[[str], None]) -> Run:
  """Returns the run with the features of videos, and reasons of those that failed.

  Every process encodes a share. `run.watch` may stop all processes between batches.

  Args:
    run: the run.
    rows: videos and images of each conversation; features that are on disk are reused.
    note: receives lines of progress.
  """
  known = run.features.files.keys() | run.features.failures.keys()
  named = {format_video_name(x): x for media in rows for x in list_media(media)}
  todo = [video for name, video in named.items() if name not in known]
  if todo:
    run = run._replace(features=_encode(run, todo, note))
  if run.processor.layout is not None:
    return run
  readable = {format_video_name(x): x for x in rows if run.features.has(x)}
  counts = (count_features(run.lay_out_video(x)) for x in readable.values())
  longest = max(counts, default=0)
  length = tokenization.round_up_length(longest, multiple=LENGTH_MULTIPLE)
  length = max(length, run.features.length)
  return run._replace(features=run.features._replace(length=length))


def _encode(
  run: Run, todo: Sequence[VideoPath], note: Callable[[str], None]
) -> features.FeatureStore:
  """Returns the features of the run and of more videos, which all processes encode."""
  store = _encode_local_share(run, distributed.local_items(todo), note)
  results = {
    "files": {name: str(path) for name, path in store.files.items()},
    "layouts": {name: x._asdict() for name, x in store.layouts.items()},
    "failures": store.failures,
  }
  known = run.features
  files, layouts = dict(known.files), dict(known.layouts)
  failures = dict(known.failures)
  for part in distributed.allgather_json(lambda: results):
    files |= {name: pathlib.Path(path) for name, path in part["files"].items()}
    for name, layout in part["layouts"].items():
      layouts[name] = features.parse_layout(layout)
    failures |= part["failures"]
  return known._replace(
    files=files,
    layouts=layouts,
    failures=failures,
    memory=store.memory,
    arrange=store.arrange,
  )


def get_max_length(processor: Processor, prompt_len: int) -> int:
  """Returns the features of the longest video that fits in a prompt, padded.

  It is 0 for a family whose videos all have one layout.
  """
  if processor.layout is not None:
    return 0
  longest = count_features(lay_out(processor, processor.find_max_layout()))
  return tokenization.round_up_length(
    min(longest, prompt_len), multiple=LENGTH_MULTIPLE
  )


def _encode_local_share(
  run: Run, videos: Sequence[VideoPath], note: Callable[[str], None]
) -> features.FeatureStore:
  """Encodes this process's share of videos, on its own devices."""
  tower = {"vision": distributed.fetch_arrays(run.base["params"]["vision"])}
  variables, mesh = run.base, run.mesh
  if distributed.is_multiprocess():
    # This process's devices may not form a submesh of the global mesh.
    mesh = sharding.make_mesh(devices=jax.local_devices())
    variables = {"params": sharding.replicate(tower, mesh)}
  data, phases = run.config.data, PhaseTimer()
  batch = get_encoder_batch(mesh)
  folder = pathlib.Path(data.features) if data.features else run.workdir / "features"
  store = features.build_feature_store(
    videos,
    folder,
    encoder=_compute_digest(tower, run.policy.vision.settings()),
    encode=functools.partial(encode_batch, run.policy, variables, mesh, batch),
    processor=run.processor,
    batch=VIDEOS_IN_MEMORY if run.processor.layout is None else batch,
    workers=data.workers,
    timeout_s=data.timeout_s,
    decoder=data.decoder,
    memory_gb=data.features_memory_gb,
    note=note,
    check=lambda: run.watch.check(f"the features so far are saved in {folder}"),
    share=distributed.allgather_json,
    phase=phases,
  )
  seconds = phases.take_seconds()
  if "encode" in seconds:
    note(f"features: done in {sum(seconds.values()):.0f} s ({format_shares(seconds)})")
  return store


def get_encoder_batch(mesh: Mesh) -> int:
  """Returns the number of videos in a batch of the encoder."""
  return tokenization.round_up_length(
    VIDEOS_PER_DEVICE, multiple=sharding.num_batch_shards(mesh)
  )


def encode_batch(
  policy: vlm.VLM,
  variables: Params,
  mesh: Mesh,
  size: int,
  videos: Sequence[ProcessedVideo],
) -> list[np.ndarray]:
  """Returns the features of videos, by temporal patch.

  Args:
    policy: model whose vision tower is used.
    variables: variables of the model.
    mesh: mesh of the variables.
    size: videos that are encoded together, or temporal patches of a video if grids
      differ. It is constant, so that one program is compiled for each grid.
    videos: at most `size` videos; of any number if grids differ.
  """
  rows = NamedSharding(mesh, sharding.BATCH_SPEC)
  if videos[0].pixels.ndim == 4:  # Frames, of which all videos have the same number.
    call = make_encoder(policy, mesh)
    pixels = np.stack([video.pixels for video in videos])
    padded = jax.device_put(_pad_rows(pixels, size), rows)
    return list(np.asarray(call(variables, padded))[: len(videos)])
  encoded: list[np.ndarray] = []
  for pixels, (time, *sides) in videos:
    call = make_encoder(policy, mesh, tuple(sides))
    images = pixels.reshape(time, -1, pixels.shape[-1])
    parts = [
      np.asarray(call(variables, jax.device_put(_pad_rows(part, size), rows)))
      for part in np.split(images, range(size, time, size))
    ]
    encoded.append(np.concatenate(parts)[:time])
  return encoded


def _pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
  fill = np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)
  return np.concatenate([rows, fill])


@functools.lru_cache
def make_encoder(
  policy: vlm.VLM, mesh: Mesh, grid: tuple[int, int] | None = None
) -> Callable[[Params, AnyArray], Array]:
  """Returns the jitted vision tower, replicated on every device.

  Without the constraint, XLA shards the weights as they are stored and gathers all
  images on every device, which are larger than the weights.
  """
  replicated = NamedSharding(mesh, PartitionSpec())

  def encode(base, pixels):
    tower = jax.lax.with_sharding_constraint(base["params"]["vision"], replicated)
    variables = {"params": {**base["params"], "vision": tower}}
    return policy.apply(variables, pixels, grid, method="encode")

  return jax.jit(encode)


def check_same_tower(run: Run) -> None:
  """Checks that policy and reward model have the same vision tower.

  Raises:
    ValueError: settings or weights of the towers differ.
  """
  if run.reward_model_base is run.base:
    return
  differences = find_differences(
    run.policy.vision.settings(), run.reward_model.vision.settings()
  )
  shared = (
    "Videos are encoded once for both models: set --config.model.reward_model_path to a"
    " checkpoint with the policy's vision tower"
  )
  if differences:
    lines = "; ".join(f"{name} is {a} and {b}" for name, (a, b) in differences.items())
    raise ValueError(
      "the vision towers of model.path and model.reward_model_path have different "
      f"settings: {lines}. {shared}"
    )
  # The tolerance covers a float16 copy and a bfloat16 copy of the same weights.
  close = lambda a, b: a.shape == b.shape and jnp.allclose(a, b, rtol=0.02, atol=1e-3)
  towers = [base["params"]["vision"] for base in (run.base, run.reward_model_base)]
  if not all(jax.tree.leaves(jax.tree.map(close, *towers))):
    raise ValueError(
      "the vision towers of model.path and model.reward_model_path have different "
      f"weights. {shared}"
    )


def _compute_digest(tower: Params, settings: dict[str, Any]) -> str:
  """Returns a digest of a vision tower's weights and settings."""
  digest = hashlib.sha256(json.dumps(settings).encode())
  for leaf in jax.tree.leaves(tower):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def get_videos_folder(run: Run) -> str | pathlib.Path:
  """Returns the folder that video paths in records are relative to."""
  data = run.config.data
  if data.records and not data.videos:
    return pathlib.Path(data.records).parent
  return data.videos or run.workdir / "world" / "videos"


def get_media_folder(run: Run) -> pathlib.Path:
  """Returns the folder to which images in data files are written."""
  return run.workdir / "media"


def read_run_preferences(
  run: Run, path: str | os.PathLike
) -> tuple[list[PreferenceExample], list[SkippedRecord]]:
  """Reads a file of preferences about videos of the run; see records."""
  return records.read_preferences(
    path,
    videos=get_videos_folder(run),
    written=get_media_folder(run),
    allow_outside=run.config.data.allow_outside,
  )


def get_report_path(run: Run, example: Example) -> str | None:
  """Returns a video's path for the report, relative if it is in the workdir.

  A relative path remains valid when the workdir is moved. It is None for single frames
  and for several videos, of which the report shows none.
  """
  if not isinstance(example["video"], str):
    return None
  path, folder = pathlib.Path(example["video"]), run.workdir / "world" / "videos"
  return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
