"""The pre-norm decoder that Llama, Vicuna, Qwen2 and their like all are."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.models.layers import (
  Dense,
  HiddenStates,
  KVCache,
  Layer,
  RMSNorm,
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


class LayerSettings(Layer, kw_only=True):
  """What a decoder and each of its layers are told."""

  mlp: int
  heads: int
  kv_heads: int
  head_dim: int | None = None  # embed / heads unless given.
  qkv_bias: bool = False
  qk_norm: bool = False  # RMSNorm of each head's queries and keys.
  attention: str = "xla"  # Of whole sequences, see attention.attend.
  rope_base: float = 10_000.0
  eps: float = 1e-5
  rank: int = 0  # Of the LoRA update of every matrix of a block; 0 for none.
  alpha: float = 16.0


class DecoderBlock(LayerSettings):
  """Attention and a gated MLP, each around a residual."""

  @nn.compact
  def __call__(
    self,
    x: HiddenStates,
    positions: Int[Array, "batch time"],
    mask: Mask,
    cache: KVCache | None = None,
    slot: Int[Array, ""] | int = 0,
  ) -> tuple[HiddenStates, KVCache]:
    dense = functools.partial(Dense, rank=self.rank, alpha=self.alpha, **self.types)
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
    q = rope(q, positions, base=self.rope_base)
    k = rope(k, positions, base=self.rope_base)
    v = project(self.kv_heads, "v")
    seen = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2))
    if cache is None:  # Each device has queries of its own, and sees all tokens.
      seen = KVCache(*(constrain(x, BATCH_AXES, HEADS_AXIS) for x in seen))
    else:
      write = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2
      )
      seen = KVCache(write(cache.k, seen.k), write(cache.v, seen.v))
    # The kernels know nothing of tokens that stand before their first query.
    backend = self.attention if cache is None else "xla"
    h = attend(q, seen.k, seen.v, mask, backend=backend)
    x = x + dense(embed, name="o")(h.reshape(*h.shape[:2], -1))

    h = norm(name="mlp_norm")(x)
    h = nn.silu(dense(self.mlp, name="gate")(h)) * dense(self.mlp, name="up")(h)
    return x + dense(embed, name="down")(h), seen


# What of a layer is computed again in the backward pass, to hold less from the forward.
REMAT = {
  "none": lambda layer: layer,
  # All but the products with weights, which are most of the time.
  "dots": lambda layer: nn.remat(
    layer,
    prevent_cse=False,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
  "full": lambda layer: nn.remat(layer, prevent_cse=False),
}


class Decoder(LayerSettings, kw_only=True):
  """Embeddings in, hidden states out; `embed_tokens` and `logits` at both ends.

  The layers' parameters are stacked on axis 0: one layer is compiled, and scanned.
  """

  vocab: int
  embed: int
  layers: int
  tied: bool = False  # Logits are made with the embedding matrix.
  remat: str = "none"  # A key of REMAT.
  unstack: bool = False  # Before decoding, see `unstacked`.

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

  def embed_tokens(
    self, tokens: Int[Array, "*batch time"]
  ) -> Float[Array, "*batch time embed"]:
    return self.embedder(tokens)

  def head_kernel(self) -> Float[Array, "embed vocab"]:
    """The matrix that `logits` multiplies with, for losses that do so in chunks."""
    if self.tied:
      return self.embedder.embedding.T
    if self.is_initializing():
      self.lm_head(jnp.zeros((1, self.embed)))
    return jnp.asarray(self.lm_head.variables["params"]["kernel"])

  def logits(
    self, hidden: Float[Array, "*batch embed"]
  ) -> Float[Array, "*batch vocab"]:
    """float32, of the token after each hidden state."""
    kernel = self.head_kernel().astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

  def __call__(
    self, x: HiddenStates, positions: Int[Array, "batch time"], mask: Mask
  ) -> HiddenStates:
    """Hidden states after the final norm.

    Args:
      x: token embeddings, or what stands in their place.
      positions: of each token in its own sequence, for the rotary embedding.
      mask: which tokens each token sees, any pattern; or which tokens are real, each
        of which sees those up to itself; or the segment of each; or which are real, of
        prompts and responses; see attention.attend.

    Tokens are spread over the "context" of the mesh, if one is set; a length that this
    does not divide is padded for as long as the pass takes, or, of prompts and
    responses, spread as the compiler sees fit.
    """
    time = x.shape[1]
    x, positions, padded = _padded(x, positions, mask)

    def layer(block, x):
      return block(constrain(x, BATCH_AXES, TIME_AXIS), positions, padded)[0], None

    if self.remat not in REMAT:
      raise ValueError(f"remat must be one of {sorted(REMAT)}, not {self.remat!r}")
    x, _ = nn.scan(
      REMAT[self.remat](layer),
      variable_axes={"params": 0, "quant": 0, "lora": 0},
      split_rngs={"params": True, "lora": True},
      length=self.layers,
    )(self.blocks, x)
    return self.norm(constrain(x, BATCH_AXES, TIME_AXIS))[:, :time]

  def prefill(
    self,
    x: HiddenStates,
    positions: Int[Array, "batch time"],
    mask: Bool[Array, "batch time time"] | Bool[Array, "batch time"],
    slots: int,
  ) -> tuple[HiddenStates, tuple[KVCache, ...]]:
    """As __call__, and each layer's cache: `slots` long, filled up to time."""
    time, block = x.shape[1], self.blocks.clone(parent=None)
    x, positions, padded = _padded(x, positions, mask)
    layer = lambda x, variables: block.apply(
      variables, constrain(x, BATCH_AXES, TIME_AXIS), positions, padded
    )
    x, seen = jax.lax.scan(layer, x, self.blocks.variables)
    empty = [(0, 0), (0, 0), (0, slots - time), (0, 0)]
    widen = lambda x: jnp.pad(x[:, :, :time], empty)
    caches = tuple(
      KVCache(widen(seen.k[i]), widen(seen.v[i])) for i in range(self.layers)
    )
    return self.norm(constrain(x, BATCH_AXES, TIME_AXIS))[:, :time], caches

  def unstacked(self) -> tuple[Params, ...] | None:
    """The variables of each layer, for `decode`; None if it is to take them itself.

    A CPU multiplies with no part of an array before it has copied it: here that is
    done once, where `decode` would do it at every token. As there is a copy, it takes
    the LoRA update up, if it can be as exact as the model is.
    """
    if not self.unstack:
      return None
    variables = self.blocks.variables
    types = {jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)}
    exact = types == {jnp.dtype("float32")} and "quant" not in variables
    if "lora" in variables and exact:
      variables = lora.merge_lora(variables, self.alpha)
    return tuple(
      jax.tree.map(lambda a, i=i: a[i], variables) for i in range(self.layers)
    )

  def decode(
    self,
    x: HiddenStates,
    positions: Int[Array, "batch time"],
    mask: Bool[Array, "batch time slots"],
    caches: tuple[KVCache, ...],
    slot: Int[Array, ""] | int,
    layers: tuple[Params, ...] | None = None,
  ) -> tuple[HiddenStates, tuple[KVCache, ...]]:
    """As __call__ for new tokens, which see the cached ones and enter at `slot`.

    The layers are unrolled, each over a cache of its own: caches that a scan over
    layers takes in and hands out are copied whole at every step.

    Args:
      layers: what `unstacked` has made, if anything.
    """
    block = self.blocks.clone(parent=None)
    written = []
    for i, cache in enumerate(caches):
      own = jax.tree.map(lambda a, i=i: a[i], self.blocks.variables)
      variables = layers[i] if layers else own
      x, cache = block.apply(variables, x, positions, mask, cache, slot)
      written.append(cache)
    return self.norm(x), tuple(written)


def _padded(
  x: HiddenStates, positions: Int[Array, "batch time"], mask: Mask
) -> tuple[Array, Array, Array | SharedPromptMask]:
  """As many tokens for each device: others at the end, which none of these sees."""
  if isinstance(mask, SharedPromptMask):  # It says where responses end.
    return x, positions, mask
  more = -x.shape[1] % axis_size(TIME_AXIS)
  widen = lambda x, axes: jnp.pad(
    x, [(0, 0)] + [(0, more)] * axes + [(0, 0)] * (x.ndim - 1 - axes)
  )
  return widen(x, 1), widen(positions, 1), widen(mask, mask.ndim - 1)
