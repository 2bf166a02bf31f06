"""Pretraining of a small base model: packed conversations, and CLIP's contrast.

Everything is trained that is not frozen: vision tower, projector, language model, and
CLIP's text tower with both projections, which share the vision tower.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import AnyArray, Loss, Method, merge_params, offline
from vlmrlaif_jax.losses.logprobs import chunked_token_logps
from vlmrlaif_jax.models.projector import pool_video


class PretrainBatch(NamedTuple):
  """Packed conversations about videos, and a caption of one frame of each."""

  video: UInt8[AnyArray, "batch frames height width 3"]
  third: Int[AnyArray, " batch"]  # Which third of the frames the clip's caption is of.
  tokens: Int[AnyArray, "batch time"]
  segments: Int[AnyArray, "batch time"]
  positions: Int[AnyArray, "batch time"]
  weights: Float[AnyArray, "batch time"]
  frame: Int[AnyArray, " batch"]  # The frame that the caption is of.
  caption: Int[AnyArray, "batch words"]
  caption_mask: Bool[AnyArray, "batch words"]


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      contrast_coef=0.1,  # Of CLIP's loss beside the language model's.
      clip_segment=1,  # Of the conversation about a third of the clip.
    )
  )


def make(config: ConfigDict, parts: Any) -> Method:
  """The method; parts.policy is the VLM and parts.critic the CLIP it shares with."""
  vlm, clip = parts.policy, parts.critic

  def features(model, batch):
    """Pooled features of each whole clip, then those of the third, in token order.

    Those of its patches if it is an image.
    """
    projected = model.projector(model.encode(batch.video))
    if projected.shape[1] == 1:
      return pool_video(projected)
    count = projected.shape[1] // 3
    at = batch.third[:, None] * count + jnp.arange(count)
    third = jnp.take_along_axis(projected, at[..., None, None], axis=1)
    return jnp.concatenate([pool_video(projected), pool_video(third)], axis=1)

  def hidden_and_head(model, batch):
    x = model.merge_video_tokens(batch.tokens, features(model, batch))
    seen = attention(batch.segments, config.clip_segment)
    return model.llm(x, batch.positions, seen), model.head_kernel()

  def loss(params, frozen, batch: PretrainBatch):
    params = merge_params(frozen, params)
    hidden, head = vlm.apply({"params": params["vlm"]}, batch, method=hidden_and_head)
    logps = chunked_token_logps(hidden, head, batch.tokens, chunk=64)
    weight = jnp.sum(batch.weights)
    nll = -jnp.sum(logps * batch.weights) / weight
    contrast, matched = contrastive(params, batch)
    total = nll + config.contrast_coef * contrast
    return Loss(
      total, weight, {"loss": nll, "clip_loss": contrast, "clip_accuracy": matched}
    )

  def contrastive(params, batch):
    """CLIP's symmetric loss between frames and their captions (2103.00020, fig. 3)."""
    variables = {"params": {**params["clip"], "vision": params["vlm"]["vision"]}}
    rows = jnp.arange(len(batch.frame))
    pixels = batch.video[rows, batch.frame]
    logits = clip.apply(variables, pixels, batch.caption, batch.caption_mask)
    losses = [
      optax.softmax_cross_entropy_with_integer_labels(side, rows).mean()
      for side in (logits, logits.T)
    ]
    matched = jnp.mean(jnp.argmax(logits, axis=1) == rows)
    return sum(losses) / 2, matched

  return Method(PretrainBatch, offline, loss)


def attention(
  segments: Int[Array, "batch time"], clip_segment: int
) -> Bool[Array, "batch time time"]:
  """Who sees whom: a conversation sees itself and the video before it."""
  own = segments[:, :, None] == segments[:, None, :]
  video = (segments[:, None, :] == 0) & (segments[:, :, None] > clip_segment)
  causal = jnp.tri(segments.shape[1], dtype=bool)
  return (own | video) & causal & (segments >= 0)[:, None, :]
