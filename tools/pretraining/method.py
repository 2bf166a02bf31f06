"""Pretraining of a small base model: packed conversations and CLIP's contrastive loss.

The VLM and CLIP share the vision tower. All parameters that are not frozen are trained:
the vision tower, the projector, the language model, and CLIP's text tower with both
projections.
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
  """A batch of packed conversations about videos, with a caption of one frame each."""

  video: UInt8[AnyArray, "batch frames height width 3"]
  third: Int[AnyArray, " batch"]  # Third of the clip with its own task, 0 to 2.
  tokens: Int[AnyArray, "batch time"]
  segments: Int[AnyArray, "batch time"]
  positions: Int[AnyArray, "batch time axes"]
  weights: Float[AnyArray, "batch time"]
  frame: Int[AnyArray, " batch"]  # Frame that the caption describes.
  caption: Int[AnyArray, "batch words"]
  caption_mask: Bool[AnyArray, "batch words"]


def default_config() -> ConfigDict:
  """Returns the settings of the method."""
  return ConfigDict(
    dict(
      contrast_coef=0.1,  # Weight of CLIP's loss in the total loss.
      clip_segment=1,  # Segment of the conversation about a third of the clip.
    )
  )


def make(config: ConfigDict, parts: Any) -> Method:
  """Returns the method.

  Args:
    config: See `default_config`.
    parts: `policy` is the VLM; `critic` is the CLIP with the same vision tower.
  """
  vlm, clip = parts.policy, parts.critic

  def features(model, batch):
    """Pools the features of each clip, then those of its third, in token order.

    An image has the features of its patches.
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
    mask = make_attention_mask(batch.segments, config.clip_segment)
    return model.llm(x, batch.positions, mask), model.head_kernel()

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
    """Computes CLIP's symmetric loss of frames and captions (2103.00020, fig. 3)."""
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


def make_attention_mask(
  segments: Int[Array, "batch time"], clip_segment: int
) -> Bool[Array, "batch time time"]:
  """Returns the attention mask of packed conversations.

  A conversation attends to itself and to the video before it.

  Args:
    segments: 0 for the video, -1 for padding, other numbers for conversations.
    clip_segment: The conversation about a third of the clip, which attends to itself
      only.
  """
  own = segments[:, :, None] == segments[:, None, :]
  video = (segments[:, None, :] == 0) & (segments[:, :, None] > clip_segment)
  causal = jnp.tri(segments.shape[1], dtype=bool)
  return (own | video) & causal & (segments >= 0)[:, None, :]
