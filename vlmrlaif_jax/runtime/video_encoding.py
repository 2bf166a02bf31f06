"""Videos' features by the vision tower: on the mesh, each process its share."""

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
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.interrupts import Watch
from vlmrlaif_jax.core.profiling import Phases, shares
from vlmrlaif_jax.core.types import AnyArray, Params
from vlmrlaif_jax.data import features, tokenization
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.models import vlm


def make_store(
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh,
  policy: vlm.VLM,
  base: Params,
  videos: Sequence[VideoPath],
  note: Callable[[str], None],
  watch: Watch,
) -> features.Store:
  """The features of videos; those that are not on disk yet are encoded.

  Args:
    base: variables of the policy.
    note: takes a line of text that tells how far it is.
    watch: asked between batches of videos whether to end; of several processes all
      ask equally often.
  """
  jobs = {features.name_of(video): video for video in videos}
  digest, encode, shards = _encoder(policy, base, mesh)
  data, phases = config.data, Phases()
  folder = pathlib.Path(data.features) if data.features else workdir / "features"
  made_so_far = f"the features made so far are in {folder}"

  def build(part: Sequence[VideoPath]) -> features.Store:
    return features.build(
      part,
      folder,
      encoder=digest,
      encode=encode,
      count=config.model.frames,
      size=policy.vision.image,
      batch=tokenization.bucket(32, multiple=shards),
      workers=data.workers,
      timeout_s=data.timeout_s,
      memory_gb=data.features_memory_gb,
      note=note,
      check=lambda: watch.check(made_so_far),
      share=distributed.share,
      phase=phases,
    )

  store = _encoded_by_all(build, list(jobs.values()))
  seconds = phases.taken()
  if "encode" in seconds:
    note(f"features: done in {sum(seconds.values()):.0f} s ({shares(seconds)})")
  return store


def _encoder(
  policy: vlm.VLM, base: Params, mesh: Mesh
) -> tuple[str, features.Encode, int]:
  """(name of the tower, from pixels to features, how many rows at once are spread).
  Each of several processes encodes by itself, on its own devices.
  """
  tower = {"vision": distributed.fetch(base["params"]["vision"])}
  digest = _digest(tower, settings_of(policy.vision))
  variables = base
  if distributed.several():
    # Of the mesh of all they may be no part that is a mesh.
    mesh = sharding.make_mesh(devices=jax.local_devices())
    variables = {"params": sharding.replicate(tower, mesh)}
  run, rows = encoder(policy, mesh), NamedSharding(mesh, sharding.ROWS)
  encode = lambda pixels: np.asarray(run(variables, jax.device_put(pixels, rows)))
  return digest, encode, sharding.row_shards(mesh)


def _encoded_by_all(
  build: Callable[[Sequence[VideoPath]], features.Store], videos: Sequence[VideoPath]
) -> features.Store:
  """The store of all videos, of which each process encodes its share."""
  if not distributed.several():
    return build(videos)
  store = build(distributed.part_of(videos))
  told = {
    "files": {name: str(path) for name, path in store.files.items()},
    "failures": store.failures,
  }
  files: dict[str, pathlib.Path] = {}
  failures: dict[str, str] = {}
  for part in distributed.share(lambda: told):
    files |= {name: pathlib.Path(path) for name, path in part["files"].items()}
    failures |= part["failures"]
  return store._replace(files=files, failures=failures)


def encoder(policy: vlm.VLM, mesh: Mesh) -> Callable[[Params, AnyArray], Array]:
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


def settings_of(vision: nn.Module) -> dict[str, Any]:
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
