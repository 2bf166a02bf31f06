"""Shapes, dtypes and shardings of the arrays that a run puts on its devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch, Groups, PackedBatch
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.runtime.run import Run


def row_specs(tree: PyTree, mesh: Mesh) -> PyTree:
  """Returns shapes whose rows are sharded as by sharding.shard_batch."""
  at = NamedSharding(mesh, sharding.BATCH_SPEC)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree
  )


def scalar_spec(mesh: Mesh, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  """Returns the shape of a scalar that is replicated on the mesh."""
  return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, P()))


def key_spec(mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Returns the shape of a random key."""
  return scalar_spec(mesh, jax.eval_shape(lambda: jax.random.key(0)).dtype)


def get_video_length(run: Run) -> int:
  """Returns the frames of a video, or its features if videos have different numbers."""
  return run.features.length or run.config.model.frames


def batch_specs(run: Run, rows: int, time: int, frames: int = 0) -> Batch:
  """Returns the shapes of a batch of token rows and video features.

  Args:
    run: the run whose mesh and vision tower apply.
    rows: rows of the batch.
    time: tokens of a row.
    frames: places of a video; 0 for those of get_video_length.
  """
  shape = (rows, frames or get_video_length(run), *run.policy.vision.feature_shape)
  video = jax.ShapeDtypeStruct(shape, jnp.float16)
  columns = _token_specs(run, rows, time)
  return row_specs(jax.eval_shape(Batch, video, *columns), run.mesh)


def _token_specs(run: Run, *shape: int) -> list[jax.ShapeDtypeStruct]:
  """Returns the shapes of tokens, mask, loss mask and positions."""
  each = [jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, bool, bool)]
  axes = run.policy.llm.position_axes
  return [*each, jax.ShapeDtypeStruct((*shape, axes), jnp.int32)]


def pair_specs(run: Run, rows: int, start: int, time: int) -> Groups:
  """Returns the shapes of pairs of responses.

  Args:
    run: the run whose mesh and vision tower apply.
    rows: number of pairs.
    start: tokens of a prompt.
    time: tokens of a response.
  """
  responses = row_specs(_token_specs(run, rows, 2, time), run.mesh)
  return Groups(batch_specs(run, rows, start), *responses)


def packed_specs(run: Run, config: Any, examples: int, time: int) -> PackedBatch:
  """Returns the shapes of packed rows for examples that all have the maximum length.

  The number of rows of a run depends on its data and is at most this one.

  Args:
    run: the run whose mesh and vision tower apply.
    config: a section with pack_len and microbatches.
    examples: examples per step.
    time: maximum number of tokens of an example.
  """
  multiple = sharding.num_batch_shards(run.mesh) * config.microbatches
  rows = -(-examples * time // config.pack_len)
  rows = tokenization.round_up_length(rows, multiple=multiple)
  videos = -(-examples // rows)
  one = batch_specs(run, rows, config.pack_len)
  video = jax.ShapeDtypeStruct((rows, videos, *one.video.shape[1:]), jnp.float16)
  owners = jax.ShapeDtypeStruct((rows, videos), jnp.int32)
  video, owners = row_specs((video, owners), run.mesh)
  return PackedBatch(video, owners, one.tokens, one.tokens, *one[3:])
