"""Videos of a run: their features, made by the vision tower."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.files import find_differences
from vlmrlaif_jax.core.profiling import PhaseTimer, format_shares
from vlmrlaif_jax.core.types import AnyArray, Params
from vlmrlaif_jax.data import features, tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.video import VideoPath, format_video_name
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime.run import Run

VIDEOS_PER_DEVICE = 32  # Videos that are encoded together, at least.


def encode_videos(
  run: Run, videos: Sequence[VideoPath], note: Callable[[str], None]
) -> Run:
  """Returns the run with the features of these videos, or why there are none.

  Several processes each encode a share, and `run.watch` may end all of them between
  two batches.

  Args:
    videos: those that are not on disk yet are encoded.
    note: receives lines of progress.
  """
  known = run.features.files.keys() | run.features.failures.keys()
  named = {format_video_name(video): video for video in videos}
  todo = [video for name, video in named.items() if name not in known]
  if not todo:
    return run
  store = _encoded(run, distributed.local_items(todo), note)
  made = {
    "files": {name: str(path) for name, path in store.files.items()},
    "failures": store.failures,
  }
  files, failures = dict(run.features.files), dict(run.features.failures)
  for part in distributed.allgather_json(lambda: made):
    files |= {name: pathlib.Path(path) for name, path in part["files"].items()}
    failures |= part["failures"]
  kept = run.features.cached
  return run._replace(
    features=features.FeatureStore(files, failures, kept, store.memory)
  )


def _encoded(
  run: Run, videos: Sequence[VideoPath], note: Callable[[str], None]
) -> features.FeatureStore:
  """Encodes this process's share of videos, on its own devices."""
  tower = {"vision": distributed.fetch_arrays(run.base["params"]["vision"])}
  variables, mesh = run.base, run.mesh
  if distributed.is_multiprocess():
    # Of the mesh of all they may be no part that is a mesh.
    mesh = sharding.make_mesh(devices=jax.local_devices())
    variables = {"params": sharding.replicate(tower, mesh)}
  call, rows = make_encoder(run.policy, mesh), NamedSharding(mesh, sharding.BATCH_SPEC)
  data, phases = run.config.data, PhaseTimer()
  folder = pathlib.Path(data.features) if data.features else run.workdir / "features"
  store = features.build_feature_store(
    videos,
    folder,
    encoder=_digest(tower, get_tower_settings(run.policy.vision)),
    encode=lambda pixels: np.asarray(call(variables, jax.device_put(pixels, rows))),
    count=run.config.model.frames,
    size=run.policy.vision.image,
    batch=get_encoder_batch(mesh),
    workers=data.workers,
    timeout_s=data.timeout_s,
    memory_gb=data.features_memory_gb,
    note=note,
    check=lambda: run.watch.check(f"the features made so far are in {folder}"),
    share=distributed.allgather_json,
    phase=phases,
  )
  seconds = phases.take_seconds()
  if "encode" in seconds:
    note(f"features: done in {sum(seconds.values()):.0f} s ({format_shares(seconds)})")
  return store


def get_encoder_batch(mesh: Mesh) -> int:
  """Returns how many videos are encoded together."""
  return tokenization.round_up_length(
    VIDEOS_PER_DEVICE, multiple=sharding.num_batch_shards(mesh)
  )


@functools.lru_cache
def make_encoder(policy: vlm.VLM, mesh: Mesh) -> Callable[[Params, AnyArray], Array]:
  """The vision tower, compiled at its first call; whole on every device.

  Left to choose, a compiler splits its matrices as they are held and gives every
  device all images, of which there are more than weights.
  """
  whole = NamedSharding(mesh, PartitionSpec())

  def encode(base, pixels):
    tower = jax.lax.with_sharding_constraint(base["params"]["vision"], whole)
    variables = {"params": {**base["params"], "vision": tower}}
    return policy.apply(variables, pixels, method="encode")

  return jax.jit(encode)


def check_same_tower(run: Run) -> None:
  """Checks that a reward model of its own reads the features of the policy's tower.

  Raises:
    ValueError: the towers differ.
  """
  if run.reward_model_base is run.base:
    return
  found = find_differences(
    get_tower_settings(run.policy.vision), get_tower_settings(run.reward_model.vision)
  )
  if found:
    told = "; ".join(f"{name} is {a} and {b}" for name, (a, b) in found.items())
    raise ValueError(
      "model.path and model.reward_model_path read their vision towers differently: "
      f"{told}. Videos are encoded once, for both: give checkpoints that share a "
      "frozen tower"
    )
  # One of them may have been kept in float16 and the other in bfloat16.
  close = lambda a, b: a.shape == b.shape and jnp.allclose(a, b, rtol=0.02, atol=1e-3)
  towers = [base["params"]["vision"] for base in (run.base, run.reward_model_base)]
  if not all(jax.tree.leaves(jax.tree.map(close, *towers))):
    raise ValueError(
      "model.path and model.reward_model_path hold different vision towers; videos are "
      "encoded once, for both: give checkpoints that share a frozen tower"
    )


def get_tower_settings(vision: nn.Module) -> dict[str, Any]:
  """What of a vision tower's features its weights do not tell."""
  black_to_white = jnp.array([[[0] * 3, [255] * 3]], jnp.uint8)
  return {
    "kind": type(vision).__module__,  # Whether there is a class token, which is cut.
    "image": vision.image,
    "patch": vision.patch,
    "heads": vision.heads,
    "activation": vision.activation,
    "eps": vision.eps,
    "layer": vision.select_layer % (vision.layers + 1),
    "dtype": jnp.dtype(vision.dtype).name,
    # Rounded, for accelerators do not divide alike to the last bit.
    "pixels": np.round(vision.normalise(black_to_white), 4).tolist(),
  }


def _digest(tower: Params, settings: dict[str, Any]) -> str:
  """Names a vision tower by its weights and its settings."""
  digest = hashlib.sha256(json.dumps(settings).encode())
  for leaf in jax.tree.leaves(tower):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def get_videos_folder(run: Run) -> str | pathlib.Path:
  """Returns the folder that the records name their videos from."""
  return run.config.data.videos or run.workdir / "world" / "videos"


def get_report_path(run: Run, example: Example) -> str | None:
  """A video as the report finds it, also in a workdir that was moved."""
  if not isinstance(example["video"], str):
    return None  # Single frames: the report shows no strip of them.
  path, folder = pathlib.Path(example["video"]), run.workdir / "world" / "videos"
  return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
