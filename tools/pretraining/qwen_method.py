"""Pretraining of a small Qwen3-VL: all parameters learn packed conversations."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tools.pretraining.method import make_attention_mask
from tools.pretraining.mix import CLIP_SEGMENT
from vlmrlaif_jax.core.types import AnyArray, Batch, Loss, Method, merge_params, offline
from vlmrlaif_jax.losses.logprobs import chunked_token_logps


class QwenBatch(NamedTuple):
  """A batch of packed conversations about videos or images."""

  patches: Float[AnyArray, "batch times patches channels"]  # Normalized pixels.
  third: Int[AnyArray, " batch"]  # Third of the clip with its own task, 0 to 2.
  tokens: Int[AnyArray, "batch time"]
  segments: Int[AnyArray, "batch time"]
  positions: Int[AnyArray, "batch time axes"]
  weights: Float[AnyArray, "batch time"]


def make(parts: Any, grid: tuple[int, int]) -> Method:
  """Returns the method.

  Args:
    parts: `policy` is the VLM.
    grid: Rows and columns of patches.
  """
  vlm = parts.policy

  def hidden_and_head(model, batch):
    images = batch.patches.reshape(-1, *batch.patches.shape[2:])
    features = model.encode(images, grid)
    features = features.reshape(*batch.patches.shape[:2], *features.shape[1:])
    video = order_features(features, batch.third)
    real = batch.segments >= 0
    rows = Batch(video, batch.tokens, real, batch.weights > 0, batch.positions)
    mask = make_attention_mask(batch.segments, CLIP_SEGMENT)
    return model.hidden(rows, mask), model.head_kernel()

  def loss(params, frozen, batch: QwenBatch):
    params = merge_params(frozen, params)
    hidden, head = vlm.apply({"params": params}, batch, method=hidden_and_head)
    logps = chunked_token_logps(hidden, head, batch.tokens, chunk=64)
    weight = jnp.sum(batch.weights)
    nll = -jnp.sum(logps * batch.weights) / weight
    return Loss(nll, weight, {"loss": nll})

  return Method(QwenBatch, offline, loss)


def order_features(
  features: Float[Array, "batch times tokens channels"], third: Int[Array, " batch"]
) -> Float[Array, "batch places channels"]:
  """Returns the features of each clip, then those of its third, in token order.

  An image has no thirds.
  """
  batch, times, _, channels = features.shape
  if times > 1:
    count = times // 3
    at = third[:, None] * count + jnp.arange(count)
    part = jnp.take_along_axis(features, at[..., None, None], axis=1)
    features = jnp.concatenate([features, part], axis=1)
  return features.reshape(batch, -1, channels)
