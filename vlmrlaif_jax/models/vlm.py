"""Video-language model: a language model whose input contains features of videos.

Families differ in the vision tower and in `projector.connect`. LLaVA projects and pools
features. Qwen3-VL splits them into those that take the place of token embeddings, and
DeepStack's, which are added to hidden states of the first layers.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8

from vlmrlaif_jax.core.types import (
  VIDEO_TOKEN,
  AnyArray,
  Batch,
  Groups,
  PackedBatch,
  Params,
  flatten_groups,
)
from vlmrlaif_jax.models import clip, projector, siglip
from vlmrlaif_jax.models.decoder import LayerAdditions
from vlmrlaif_jax.models.decoders import qwen2
from vlmrlaif_jax.models.layers import Dense, HiddenStates, KVCache
from vlmrlaif_jax.models.ops.attention import SharedPromptMask

# Those of a LLaVA; huggingface.families has those of all families.
SHARDING = (
  (r"/head/(kernel|bias)", P()),
  *projector.SHARDING,
  *clip.SHARDING,
  *siglip.SHARDING,
  *qwen2.SHARDING,  # Includes the rules of Llama and Qwen3.
)


def merge_video(
  x: HiddenStates,
  video: Float[Array, "batch tokens embed"],
  is_video: Bool[Array, "batch time"],
  index: Int[Array, "batch time"] | None = None,
) -> HiddenStates:
  """Replaces embeddings by video features where is_video is True.

  Args:
    x: embeddings of tokens.
    video: features, of which a row may have more than its tokens.
    is_video: whether a token is a placeholder of a feature.
    index: number of each placeholder's feature; None for the features in order.
  """
  if index is None:
    index = jnp.cumsum(is_video, axis=1) - 1
  index = jnp.clip(index, 0, video.shape[1] - 1)
  placed = jnp.take_along_axis(video, index[..., None], axis=1)
  return jnp.where(is_video[..., None], placed.astype(x.dtype), x)


def index_packed_features(
  packed: PackedBatch, is_video: Bool[Array, "batch time"], count: int
) -> Int[Array, "batch time"]:
  """Returns the number of each placeholder's feature among all of a row's videos.

  Args:
    packed: packed examples.
    is_video: whether a token is a placeholder of a feature.
    count: features of a video, of which an example may use fewer.
  """
  segments = packed.segments
  before = jnp.cumsum(is_video, axis=1) - is_video
  starts = segments != jnp.pad(segments, [(0, 0), (1, 0)])[:, :-1]
  first = jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
  video = jnp.take_along_axis(packed.video_of, jnp.maximum(segments - 1, 0), axis=1)
  return video * count + before - first


class Embedded(NamedTuple):
  """The input of the language model."""

  x: HiddenStates  # Embeddings of tokens and video features.
  additions: LayerAdditions | None  # DeepStack features; see Decoder.


def encode_video(model: "VLM", variables: Params, batch: Batch) -> Batch:
  """Returns a batch whose video is features; pixels are encoded."""
  return batch._replace(video=model.bind(variables).encode(batch.video))


class GroupStates(NamedTuple):
  """Hidden states of groups, after the final norm."""

  prompts: Float[Array, "prompts embed"]  # State of each prompt's last token.
  responses: Float[Array, "prompts group time embed"]  # States of all tokens.


class VLM(nn.Module):
  """Vision tower, projector and language model, with an optional scalar head."""

  vision: nn.Module
  projector: nn.Module
  llm: nn.Module
  scalar_head: bool = False  # Adds a head with a reward or value for every token.

  def setup(self):
    if self.scalar_head:
      bound = self.llm.embed**-0.5
      uniform = lambda key, shape, dtype: (
        nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound
      )
      self.head = Dense(1, bias=True, kernel_init=uniform)

  def encode(
    self,
    video: UInt8[AnyArray, "batch frames height width 3"]
    | Float[AnyArray, "batch frames height width 3"]
    | Float[AnyArray, "batch *places channels"],
    grid: tuple[int, int] | None = None,
  ) -> Float[AnyArray, "batch *tokens features"]:
    """Encodes pixels with the vision tower; returns features unchanged.

    Args:
      video: frames with pixels, raw (uint8) or normalized; patches of pixels, if a grid
        is given; or features.
      grid: rows and columns of patches, for a family with several grids.
    """
    is_pixels = grid is not None or video.ndim == 5
    return self.vision.features(video, grid) if is_pixels else video

  def merge_video_tokens(
    self, tokens: Int[AnyArray, "batch time"], video: Float[Array, "batch places embed"]
  ) -> HiddenStates:
    """Returns token embeddings, with video features at the positions of VIDEO_TOKEN."""
    x = self.llm.embed_tokens(jnp.maximum(tokens, 0))
    return merge_video(x, video, tokens == VIDEO_TOKEN)

  def _embed(self, batch: Batch | PackedBatch) -> Embedded:
    """Returns the embeddings of tokens and features of videos."""
    is_video = batch.tokens == VIDEO_TOKEN
    x = self.llm.embed_tokens(jnp.maximum(batch.tokens, 0))
    if isinstance(batch, PackedBatch):
      rows, videos = batch.video.shape[:2]
      flat = batch.video.reshape(rows * videos, *batch.video.shape[2:])
      merged, deepstack = self.projector.connect(flat)
      index = index_packed_features(batch, is_video, merged.shape[1])
      join = lambda x: x.reshape(rows, -1, x.shape[-1])
    else:
      merged, deepstack = self.projector.connect(self.encode(batch.video))
      index, join = None, lambda x: x
    place = lambda x, video: merge_video(x, join(video), is_video, index)
    additions = None
    if deepstack is not None:
      additions = jax.vmap(functools.partial(place, jnp.zeros_like(x)))(deepstack)
    return Embedded(place(x, merged), additions)

  def embed(self, batch: Batch) -> HiddenStates:
    """Returns the embeddings of tokens, with features of videos in their places.

    DeepStack's features, which some families add to later layers, are left out.
    """
    return self._embed(batch).x

  def hidden(
    self,
    batch: Batch | PackedBatch,
    attention: Bool[Array, "batch time time"] | None = None,
  ) -> HiddenStates:
    """Computes hidden states after the final norm.

    Args:
      batch: tokens with padding on either side and their video; or packed examples,
        which do not attend to each other.
      attention: mask of the tokens that each token attends to; None for causal
        attention to real tokens.
    """
    x, additions = self._embed(batch)
    mask = batch.segments if isinstance(batch, PackedBatch) else batch.mask
    if attention is not None:
      mask = attention
    return self.llm(x, batch.positions, mask, additions)

  def hidden_groups(self, groups: Groups, *, shared: bool) -> GroupStates:
    """Computes hidden states of prompts and responses.

    Args:
      groups: responses, grouped by prompt.
      shared: whether the responses of a group share one copy of the prompt in a row,
        or are rows with a copy each. The states are the same.
    """
    prompts, start = groups.prompts, groups.prompts.mask.shape[1]
    count, group, time = groups.tokens.shape
    if not shared:
      hidden = self.hidden(flatten_groups(groups)).reshape(
        count, group, start + time, -1
      )
      return GroupStates(hidden[:, 0, start - 1], hidden[:, :, start:])
    append = lambda prompt, response: jnp.concatenate(
      [prompt, response.reshape(count, group * time, *prompt.shape[2:])], axis=1
    )
    positions = append(prompts.positions, groups.positions)
    responses = self.llm.embed_tokens(jnp.maximum(groups.tokens, 0))
    embedded, additions = self._embed(prompts)
    mask = SharedPromptMask(prompts.mask, groups.mask)
    hidden = self.llm(append(embedded, responses), positions, mask, additions)
    responses = hidden[:, start:].reshape(count, group, time, -1)
    return GroupStates(hidden[:, start - 1], responses)

  def __call__(self, batch: Batch) -> Float[Array, "batch time vocab"]:
    """Computes float32 logits of the token after each token."""
    if self.is_initializing():  # A batch of features does not initialize the tower.
      self.vision(*self.vision.example_inputs())
    hidden = self.hidden(batch)
    if self.is_initializing() and self.scalar_head:
      self.head(hidden)
    return self.llm.logits(hidden)

  def scalars(self, batch: Batch | PackedBatch) -> Float[Array, "batch time"]:
    """Computes the scalar head's float32 output at each token."""
    return self.head(self.hidden(batch))[..., 0]

  def scores(self, batch: Batch) -> Float[Array, " batch"]:
    """Computes the scalar head's output at the last real token: the reward."""
    last = batch.mask.shape[1] - 1 - jnp.argmax(batch.mask[:, ::-1], axis=1)
    return jnp.take_along_axis(self.scalars(batch), last[:, None], axis=1)[:, 0]

  def group_scores(
    self, groups: Groups, *, shared: bool
  ) -> Float[Array, "prompts group"]:
    """Computes `scores` of each response of groups; for `shared`, see hidden_groups."""
    hidden = self.hidden_groups(groups, shared=shared).responses
    last = groups.mask.shape[2] - 1 - jnp.argmax(groups.mask[..., ::-1], axis=2)
    hidden = jnp.take_along_axis(hidden, last[..., None, None], axis=2)
    return self.head(hidden)[..., 0, 0]

  def compute_logits(
    self, hidden: Float[Array, "*batch embed"]
  ) -> Float[Array, "*batch vocab"]:
    """Computes float32 logits of the token after each hidden state."""
    return self.llm.logits(hidden)

  def head_kernel(self) -> Float[Array, "embed vocab"]:
    """Returns the matrix from hidden states to logits."""
    return self.llm.head_kernel()

  def prefill(
    self, batch: Batch, slots: int
  ) -> tuple[Float[Array, "batch embed"], tuple[KVCache, ...]]:
    """Runs prompts that are padded on the left.

    Returns:
      The hidden state of the last token, and caches of length `slots`.
    """
    x, additions = self._embed(batch)
    hidden, caches = self.llm.prefill(x, batch.positions, batch.mask, slots, additions)
    return hidden[:, -1], caches

  def decode(
    self,
    token: Int[Array, " batch"],
    position: Int[Array, " batch"],
    slot: Int[Array, ""] | int,
    mask: Bool[Array, "batch slots"],
    caches: tuple[KVCache, ...],
    layers: tuple[Params, ...] | None = None,
  ) -> tuple[Float[Array, "batch embed"], tuple[KVCache, ...]]:
    """Computes the hidden state of one more token per row, and updates the caches.

    Args:
      token: the token that was sampled last.
      position: its position, which is the same on all axes.
      slot: slot of the caches where the token is written, the same for all rows.
      mask: True for slots with real tokens, including this one.
      caches: caches of the earlier tokens.
      layers: result of `unstack_layers`.
    """
    x = self.llm.embed_tokens(token[:, None])
    at = position[:, None, None]
    hidden, caches = self.llm.decode(x, at, mask[:, None], caches, slot, layers)
    return hidden[:, 0], caches

  def unstack_layers(self) -> tuple[Params, ...] | None:
    """Returns the variables of each layer; see Decoder.unstack_layers."""
    return self.llm.unstack_layers()


def get_param_shapes(model: VLM) -> Params:
  """Returns shapes and dtypes of a VLM's "params", without allocating them."""
  return get_variable_shapes(model)["params"]


@functools.lru_cache
def get_variable_shapes(model: VLM) -> Params:
  """Returns shapes and dtypes of all variables, including "lora" and the head."""
  # Attention kernels require a row on each shard of the mesh.
  model = model.clone(llm=model.llm.clone(attention="xla"))
  tokens = jnp.zeros((1, 1), int)
  mask, video = tokens == 0, jnp.zeros((1, 1, *model.vision.feature_shape))
  batch = Batch(video, tokens, mask, mask, tokens[..., None])
  return jax.eval_shape(model.init, jax.random.key(0), batch)
