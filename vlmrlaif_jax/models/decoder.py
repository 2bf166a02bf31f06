"""Pre-norm transformer decoder, shared by Llama, Mistral, Qwen2 and Qwen3."""

import functools
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.models.layers import (
  Dense,
  HiddenStates,
  KVCache,
  Layer,
  RMSNorm,
  RopeScaling,
  assign_frequencies,
  rope,
)
from vlmrlaif_jax.models.ops.activation_sharding import (
  BATCH_AXES,
  HEADS_AXIS,
  TIME_AXIS,
  axis_size,
  constrain,
)
from vlmrlaif_jax.models.ops.attention import Mask, SharedPromptMask, attend

# Added to the hidden states of the first `start` tokens, after layers 0, 1 and so on.
LayerAdditions: TypeAlias = Float[Array, "taps batch start embed"]


class LayerSettings(Layer, kw_only=True):
  """Settings that a decoder and each of its layers share."""

  mlp: int  # Width of the MLP.
  heads: int  # Query heads.
  kv_heads: int  # Key and value heads.
  head_dim: int | None = None  # Width of a head; None for embed / heads.
  qkv_bias: bool = False  # Adds biases to q, k and v.
  qk_norm: bool = False  # Applies RMSNorm to each head's queries and keys.
  attention: str = "xla"  # Backend for whole sequences; see attention.attend.
  rope_base: float = 10_000.0  # Base of the rotary frequencies.
  rope_scaling: RopeScaling | None = None  # Scaling of these frequencies.
  # Rotary frequencies of each axis of positions, such as time, height and width in
  # M-RoPE; empty for positions with one axis. See layers.assign_frequencies.
  mrope: tuple[int, ...] = ()
  mrope_interleaved: bool = False  # Whether the axes take turns, as in Qwen3-VL.
  eps: float = 1e-5  # Epsilon of RMSNorm.
  rank: int = 0  # Rank of the LoRA updates of all matrices of a block; 0 for none.
  alpha: float = 16.0  # LoRA updates are multiplied by alpha / rank.
  dropout: float = 0.0  # Dropout of the inputs of LoRA updates; see layers.Dense.


class DecoderBlock(LayerSettings):
  """A layer: attention and a gated MLP, each with a residual connection."""

  @nn.compact
  def __call__(
    self,
    x: HiddenStates,
    positions: Int[Array, "batch time axes"],
    mask: Mask,
    cache: KVCache | None = None,
    slot: Int[Array, ""] | int = 0,
  ) -> tuple[HiddenStates, KVCache]:
    dense = functools.partial(
      Dense, rank=self.rank, alpha=self.alpha, dropout=self.dropout, **self.types
    )
    norm = functools.partial(RMSNorm, self.eps, self.param_dtype)
    embed = x.shape[-1]
    head_dim = self.head_dim or embed // self.heads

    h = norm(name="attention_norm")(x)
    project = lambda heads, name: dense(
      heads * head_dim, bias=self.qkv_bias, name=name
    )(h).reshape(*h.shape[:2], heads, head_dim)
    q, k = project(self.heads, "q"), project(self.kv_heads, "k")
    if self.qk_norm:
      q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
    axes = None
    if self.mrope:
      axes = assign_frequencies(self.mrope, interleaved=self.mrope_interleaved)
    rotate = functools.partial(
      rope,
      positions=positions,
      base=self.rope_base,
      scaling=self.rope_scaling,
      axes=axes,
    )
    q, k = rotate(q), rotate(k)
    v = project(self.kv_heads, "v")
    kv = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2))
    if cache is None:  # Queries are sharded over time; keys and values are not.
      kv = KVCache(*(constrain(x, BATCH_AXES, HEADS_AXIS) for x in kv))
    else:
      write = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2
      )
      kv = KVCache(write(cache.k, kv.k), write(cache.v, kv.v))
    # Only "xla" supports keys before the first query.
    backend = self.attention if cache is None else "xla"
    h = attend(q, kv.k, kv.v, mask, backend=backend)
    x = x + dense(embed, name="o")(h.reshape(*h.shape[:2], -1))

    h = norm(name="mlp_norm")(x)
    h = nn.silu(dense(self.mlp, name="gate")(h)) * dense(self.mlp, name="up")(h)
    return x + dense(embed, name="down")(h), kv


# What the backward pass of a layer recomputes, to reduce memory.
REMAT = {
  "none": lambda layer: layer,
  # Everything but matmuls with weights, which take most of the time.
  "dots": lambda layer: nn.remat(
    layer,
    prevent_cse=False,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
  "full": lambda layer: nn.remat(layer, prevent_cse=False),
}


class Decoder(LayerSettings, kw_only=True):
  """A stack of decoder layers, with `embed_tokens` before it and `logits` after it.

  The layers' parameters are stacked on axis 0, and one compiled layer is scanned.
  """

  vocab: int  # Rows of the embedding matrix.
  embed: int  # Width of hidden states.
  layers: int  # Number of layers.
  tied: bool = False  # Uses the embedding matrix for logits.
  # Last tokens that a token attends to; None for all. Longer rows are an error.
  window: int | None = None
  remat: str = "none"  # A key of REMAT.
  unstack: bool = False  # Copies layers before decoding; see `unstack_layers`.

  def setup(self):
    init = nn.initializers.normal(0.02)
    self.embedder = nn.Embed(
      self.vocab, self.embed, embedding_init=init, name="embed", **self.types
    )
    names = set(DecoderBlock.__dataclass_fields__) - {"parent", "name"}
    self.blocks = DecoderBlock(**{name: getattr(self, name) for name in names})
    self.norm = RMSNorm(self.eps, self.param_dtype)
    if not self.tied:
      self.lm_head = Dense(self.vocab, **self.types)

  @property
  def position_axes(self) -> int:
    """Number of axes of the positions."""
    return len(self.mrope) or 1

  def embed_tokens(
    self, tokens: Int[Array, "*batch time"]
  ) -> Float[Array, "*batch time embed"]:
    """Returns the embeddings of tokens."""
    return self.embedder(tokens)

  def head_kernel(self) -> Float[Array, "embed vocab"]:
    """Returns the matrix of `logits`, for losses that compute logits in chunks."""
    if self.tied:
      return self.embedder.embedding.T
    if self.is_initializing():
      self.lm_head(jnp.zeros((1, self.embed)))
    return jnp.asarray(self.lm_head.variables["params"]["kernel"])

  def logits(
    self, hidden: Float[Array, "*batch embed"]
  ) -> Float[Array, "*batch vocab"]:
    """Computes float32 logits of the token after each hidden state."""
    kernel = self.head_kernel().astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

  def __call__(
    self,
    x: HiddenStates,
    positions: Int[Array, "batch time axes"],
    mask: Mask,
    additions: LayerAdditions | None = None,
  ) -> HiddenStates:
    """Computes hidden states after the final norm.

    Tokens are sharded over the "context" axis of the mesh, if one is set. A length that
    is no multiple of this axis is padded during the pass. With a SharedPromptMask it is
    not padded, and the compiler selects the sharding.

    Args:
      x: embeddings of tokens and video features.
      positions: position of each token in its sequence, for the rotary embedding.
      mask: the attention mask; see attention.attend.
      additions: terms that are added to the outputs of the first layers, as in
        DeepStack (2406.04334); 0 at other tokens than visual ones.
    """
    time = x.shape[1]
    if isinstance(mask, SharedPromptMask):
      self._check_window(mask.prompt.shape[1] + mask.responses.shape[2])
    else:
      self._check_window(time)
    x, positions, padded = _pad_time(x, positions, mask)

    def layer(block, x, number, additions):
      x = block(constrain(x, BATCH_AXES, TIME_AXIS), positions, padded)[0]
      return _add_to_layer(x, additions, number), None

    if self.remat not in REMAT:
      raise ValueError(f"remat must be one of {sorted(REMAT)}, not {self.remat!r}")
    x, _ = nn.scan(
      REMAT[self.remat](layer),
      variable_axes={"params": 0, "quant": 0, "lora": 0, "frozen_lora": 0},
      split_rngs={"params": True, "lora": True, "dropout": True},
      in_axes=(0, nn.broadcast),
    )(self.blocks, x, jnp.arange(self.layers), _pad_additions(additions, x))
    return self.norm(constrain(x, BATCH_AXES, TIME_AXIS))[:, :time]

  def _check_window(self, length: int) -> None:
    """Raises if a token of a row of `length` tokens would attend to too many.

    Within the window, sliding attention equals full attention.
    """
    if self.window is not None and length > self.window:
      raise UserError(
        f"the language model has sliding_window={self.window} in its config.json, but "
        f"a row has {length} tokens, and longer rows than the window are not "
        "supported. Lower --config.data.prompt_len, --config.data.response_len or "
        "--config.model.frames, or choose another --config.model.path."
      )

  def prefill(
    self,
    x: HiddenStates,
    positions: Int[Array, "batch time axes"],
    mask: Bool[Array, "batch time time"] | Bool[Array, "batch time"],
    slots: int,
    additions: LayerAdditions | None = None,
  ) -> tuple[HiddenStates, tuple[KVCache, ...]]:
    """Computes the same as __call__, and returns a cache of `slots` slots per layer."""
    self._check_window(slots)
    time, block = x.shape[1], self.blocks.clone(parent=None)
    x, positions, padded = _pad_time(x, positions, mask)
    additions = _pad_additions(additions, x)

    def layer(x, each):
      number, variables = each
      x = constrain(x, BATCH_AXES, TIME_AXIS)
      x, kv = block.apply(variables, x, positions, padded)
      return _add_to_layer(x, additions, number), kv

    x, kv = jax.lax.scan(layer, x, (jnp.arange(self.layers), self.blocks.variables))
    empty = [(0, 0), (0, 0), (0, slots - time), (0, 0)]
    widen = lambda x: jnp.pad(x[:, :, :time], empty)
    caches = tuple(KVCache(widen(kv.k[i]), widen(kv.v[i])) for i in range(self.layers))
    return self.norm(constrain(x, BATCH_AXES, TIME_AXIS))[:, :time], caches

  def unstack_layers(self) -> tuple[Params, ...] | None:
    """Returns a copy of the variables of each layer for `decode`; None if disabled.

    XLA on CPU copies a slice of an array before it multiplies with it. This function
    copies once, where `decode` would copy at every token. LoRA updates are merged into
    the copy if the model computes in float32 and is not quantized.
    """
    if not self.unstack:
      return None
    variables = self.blocks.variables
    types = {jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)}
    exact = types == {jnp.dtype("float32")} and "quant" not in variables
    if exact:
      variables = lora.merge_lora(variables, self.alpha)
    return tuple(
      jax.tree.map(lambda a, i=i: a[i], variables) for i in range(self.layers)
    )

  def decode(
    self,
    x: HiddenStates,
    positions: Int[Array, "batch time axes"],
    mask: Bool[Array, "batch time slots"],
    caches: tuple[KVCache, ...],
    slot: Int[Array, ""] | int,
    layers: tuple[Params, ...] | None = None,
  ) -> tuple[HiddenStates, tuple[KVCache, ...]]:
    """Computes hidden states of new tokens and writes them to the caches.

    The layers are unrolled with a cache each, because a scan over layers copies whole
    caches at every step.

    Args:
      x: embeddings of the new tokens.
      positions: position of each token in its sequence.
      mask: the slots that each token attends to.
      caches: a cache for each layer.
      slot: slot of the first new token.
      layers: result of `unstack_layers`.

    Returns:
      The hidden states after the final norm, and the updated caches.
    """
    block = self.blocks.clone(parent=None)
    written = []
    for i, cache in enumerate(caches):
      own = jax.tree.map(lambda a, i=i: a[i], self.blocks.variables)
      variables = layers[i] if layers else own
      x, cache = block.apply(variables, x, positions, mask, cache, slot)
      written.append(cache)
    return self.norm(x), tuple(written)


def _add_to_layer(
  x: HiddenStates,
  additions: Float[Array, "taps batch time embed"] | None,
  number: Int[Array, ""],
) -> HiddenStates:
  """Adds the term of a layer to its output.

  All layers are one compiled function, so those after the last tap add 0. A scanned
  input with zeros for them would be as large as the hidden states of all layers.
  """
  if additions is None:
    return x
  taps = len(additions)
  tap = jax.lax.dynamic_index_in_dim(
    additions, jnp.minimum(number, taps - 1), keepdims=False
  )
  return x + jnp.where(number < taps, tap, 0)


def _pad_additions(
  additions: LayerAdditions | None, x: HiddenStates
) -> Float[Array, "taps batch time embed"] | None:
  """Appends zeros for the other tokens of x."""
  if additions is None:
    return None
  more = [(0, 0), (0, 0), (0, x.shape[1] - additions.shape[2]), (0, 0)]
  widened = jnp.pad(additions.astype(x.dtype), more)
  return constrain(widened, (), BATCH_AXES, TIME_AXIS)


def _pad_time(
  x: HiddenStates, positions: Int[Array, "batch time axes"], mask: Mask
) -> tuple[Array, Array, Array | SharedPromptMask]:
  """Appends padding so that all devices of the context axis have as many tokens.

  Causal attention excludes it, because it follows all other tokens.
  """
  if isinstance(mask, SharedPromptMask):  # Padding would follow the last response.
    return x, positions, mask
  more = -x.shape[1] % axis_size(TIME_AXIS)
  widen = lambda x, axes: jnp.pad(
    x, [(0, 0)] + [(0, more)] * axes + [(0, 0)] * (x.ndim - 1 - axes)
  )
  return widen(x, 1), widen(positions, 1), widen(mask, mask.ndim - 1)
