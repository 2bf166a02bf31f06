"""Layers that more than one model is made of."""

from typing import NamedTuple, TypeAlias, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vlmrlaif_jax.models.ops import quantization

HiddenStates: TypeAlias = Float[Array, "batch time embed"]  # A vector for each token.


class DTypes(TypedDict):
  """The types that a layer takes as keyword arguments."""

  dtype: DTypeLike  # Of the computation.
  param_dtype: DTypeLike


class Layer(nn.Module, kw_only=True):
  """A module with types."""

  dtype: DTypeLike = "float32"  # Of the computation.
  param_dtype: DTypeLike = "float32"

  @property
  def types(self) -> DTypes:
    """The same for the layers inside."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class KVCache(NamedTuple):
  """Keys and values of one layer, for every slot of the context."""

  k: Float[Array, "batch kv_heads slots head_dim"]
  v: Float[Array, "batch kv_heads slots head_dim"]


class Dense(Layer):
  """x W (+ bias), plus a low-rank update when the "lora" collection holds one.

  LoRA (Hu et al. 2021, 2106.09685): y = x W + (alpha / rank) x A B with B = 0 at
  init. W is in the collection "params", A and B in "lora", always in float32. To
  apply without the update, pass variables without "lora". A frozen W may be in the
  collection "quant" instead, as quantization.quantise puts it there.
  """

  features: int
  bias: bool = False
  rank: int = 0  # Of the update; 0 for none.
  alpha: float = 16.0
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch inputs"]
  ) -> Float[Array, "*batch outputs"]:
    shape = (x.shape[-1], self.features)
    x = x.astype(self.dtype)
    if self.has_variable("quant", "codes"):
      y = quantization.quantized_matmul(x, self.variables["quant"])
    else:
      kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
      y = x @ kernel.astype(self.dtype)
    if self.bias:
      zeros = nn.initializers.zeros
      bias = self.param("bias", zeros, (self.features,), self.param_dtype)
      y += bias.astype(self.dtype)
    if self.rank and (self.is_initializing() or self.has_variable("lora", "a")):
      init = nn.initializers.he_uniform()
      a_shape, b_shape = (shape[0], self.rank), (self.rank, shape[1])
      a = self.variable("lora", "a", lambda: init(self.make_rng("lora"), a_shape))
      b = self.variable("lora", "b", jnp.zeros, b_shape)
      # Scaled while it is small, which spares a pass over y, and one over its gradient.
      scaled = b.value * (self.alpha / self.rank)
      y += (x @ a.value.astype(self.dtype)) @ scaled.astype(self.dtype)
    return y


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019, 1910.07467)."""

  eps: float = 1e-5
  param_dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    ones = nn.initializers.ones
    scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
    x32 = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
    return (x32 * rms * scale.astype(jnp.float32)).astype(x.dtype)


def rope(
  x: Float[Array, "batch time heads head_dim"],
  positions: Int[Array, "batch time"],
  *,
  base: float,
) -> Float[Array, "batch time heads head_dim"]:
  """Rotary position embedding, Su et al. 2021 (2104.09864), in float32.

  Half-split layout: channel i is rotated together with channel i + head_dim / 2.
  """
  half = x.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None] * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return turned.astype(x.dtype)
