"""Layers that several models share: dense with LoRA, RMSNorm, rotary embedding."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vlmrlaif_jax.core.types import AnyArray
from vlmrlaif_jax.models.ops import quantization

HiddenStates: TypeAlias = Float[Array, "batch time embed"]  # A vector for each token.


class DTypes(TypedDict):
  """Keyword arguments of a layer for its dtypes."""

  dtype: DTypeLike  # Dtype of the computation.
  param_dtype: DTypeLike  # Dtype of the parameters.


class Layer(nn.Module, kw_only=True):
  """A module with dtypes of computation and parameters."""

  dtype: DTypeLike = "float32"  # Dtype of the computation.
  param_dtype: DTypeLike = "float32"  # Dtype of the parameters.

  @property
  def types(self) -> DTypes:
    """The dtypes as arguments of inner layers."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}


def read_fields(fields: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
  """Reads the fields of a module from a config, by its family's CONFIG."""

  def get(path: str) -> Any:
    return functools.reduce(lambda at, key: at[key], path.split("."), config)

  return {field: get(path) for field, path in fields.items()}


def write_fields(fields: Mapping[str, str], module: nn.Module) -> dict[str, Any]:
  """Returns the config of a module; the inverse of read_fields."""
  values = {path: module.__dict__[field] for field, path in fields.items()}
  return unflatten_dict(values, sep=".")


def describe_settings(module: nn.Module) -> dict[str, Any]:
  """Returns the family of a vision tower and the fields that features depend on."""
  names = module.__dataclass_fields__.keys() - {"parent", "name", "param_dtype"}
  values = {name: str(module.__dict__[name]) for name in sorted(names)}
  return {"kind": type(module).__module__, **values}


class TowerShape(NamedTuple):
  """Sizes of a vision tower, for a frame or a temporal patch of a given grid."""

  pixels: tuple[int, ...]  # Shape of its input.
  pixel_dtype: DTypeLike  # Dtype of its input.
  embed: int  # Width of hidden states.
  mlp: int  # Width of the MLP.
  heads: int  # Attention heads.
  layers: int  # Layers that run.
  patches: int  # Patches.
  inputs: int  # Numbers of a patch.
  kernels: int  # Weights of a layer's matrices.
  pairs: float  # Pairs of patches that attend to each other, the mean of all layers.
  merged: int = 0  # Multiplications of the mergers.


def measure_patch_tower(
  tower: Any, patches: int, inputs: int, merged: int
) -> TowerShape:
  """Returns the sizes of a tower that reads patches and attends to all of them.

  Args:
    tower: module with the fields embed, mlp, heads and layers.
    patches: see TowerShape.
    inputs: see TowerShape.
    merged: see TowerShape.
  """
  return TowerShape(
    (patches, inputs),
    "float32",
    tower.embed,
    tower.mlp,
    tower.heads,
    tower.layers,
    patches,
    inputs,
    kernels=tower.embed * (4 * tower.embed + 2 * tower.mlp),
    pairs=patches**2,
    merged=merged,
  )


class RopeScaling(NamedTuple):
  """Scaling of the rotary frequencies of a model whose context was extended."""

  kind: str  # "linear" divides all frequencies by `factor`; "llama3" the low ones.
  factor: float
  # For "llama3": turns of a channel within `context` tokens. Channels with fewer than
  # `low` turns are divided by `factor`, those with more than `high` are unchanged.
  low: float = 1.0
  high: float = 4.0
  context: int = 8192  # Context of the model before the extension, in tokens.


class KVCache(NamedTuple):
  """Keys and values of one layer, for all slots."""

  k: Float[Array, "batch kv_heads slots head_dim"]
  v: Float[Array, "batch kv_heads slots head_dim"]


class VisualFeatures(NamedTuple):
  """Features of images or videos, one for each of their tokens."""

  merged: Float[Array, "batch tokens embed"]  # Take the place of token embeddings.
  # Added to the hidden states after decoder layer 0, 1, ... at the same tokens, as in
  # DeepStack (2406.04334).
  deepstack: Float[Array, "taps batch tokens embed"] | None = None


def lora_initializer(**axes: Any) -> Initializer:
  """Returns LoRA's initializer of A: uniform within 1 / sqrt(inputs), as in PEFT."""
  return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", **axes)


class Dense(Layer):
  """A linear layer with an optional LoRA update: Hu et al. 2021 (2106.09685), eq. 3.

    y = x W + (alpha / rank) x A B,  with B = 0 at initialization

  W is in the collection "params"; A and B are in "lora", in float32. Variables without
  "lora" disable the update. The collection "frozen_lora" may add the update of an
  earlier stage, scaled. A frozen W may be in the collection "quant"
  instead; see quantization.quantize_params.
  """

  features: int  # Outputs.
  bias: bool = False  # Adds a bias.
  rank: int = 0  # Rank of the update; 0 for none.
  alpha: float = 16.0  # The update is multiplied by alpha / rank.
  # Share of the update's inputs that are set to 0, as in PEFT, if `apply` receives the
  # random key "dropout".
  dropout: float = 0.0
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
    if self.has_variable("frozen_lora", "a"):
      frozen = self.variables["frozen_lora"]
      y += (x @ frozen["a"].astype(self.dtype)) @ frozen["b"].astype(self.dtype)
    if self.rank and (self.is_initializing() or self.has_variable("lora", "a")):
      init = lora_initializer()
      a_shape, b_shape = (shape[0], self.rank), (self.rank, shape[1])
      a = self.variable("lora", "a", lambda: init(self.make_rng("lora"), a_shape))
      b = self.variable("lora", "b", jnp.zeros, b_shape)
      if self.dropout and self.has_rng("dropout"):
        x = nn.Dropout(self.dropout, deterministic=False)(x)
      # Scaling B costs less than scaling y and its gradient.
      scaled = b.value * (self.alpha / self.rank)
      y += (x @ a.value.astype(self.dtype)) @ scaled.astype(self.dtype)
    return y


class RMSNorm(nn.Module):
  """RMS normalization in float32: Zhang and Sennrich 2019 (1910.07467), eq. 4.

  x / sqrt(mean(x^2) + eps) * scale
  """

  eps: float = 1e-5
  param_dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    ones = nn.initializers.ones
    scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
    x32 = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
    return (x32 * rms * scale.astype(jnp.float32)).astype(x.dtype)


def assign_frequencies(
  sections: tuple[int, ...], *, interleaved: bool
) -> Int[np.ndarray, " frequencies"]:
  """Returns the axis of positions that each rotary frequency reads: M-RoPE.

  Args:
    sections: number of frequencies of each axis: time, height and width.
    interleaved: True for the layout of Qwen3-VL (2511.21631): the axes take turns, and
      time has the frequencies that are left. False for that of Qwen2-VL (2409.12191):
      one section after the other.

  >>> print(assign_frequencies((3, 2, 1), interleaved=True))
  [0 1 2 0 1 0]
  >>> print(assign_frequencies((3, 2, 1), interleaved=False))
  [0 0 0 1 1 2]
  """
  if not interleaved:
    return np.repeat(np.arange(len(sections)), sections)
  axes = np.zeros(sum(sections), int)
  for axis, count in enumerate(sections[1:], start=1):
    axes[axis : count * len(sections) : len(sections)] = axis
  return axes


def rope(
  x: Float[Array, "batch time heads head_dim"],
  positions: Int[Array, "batch time axes"],
  *,
  base: float,
  scaling: RopeScaling | None = None,
  axes: Int[np.ndarray, " frequencies"] | None = None,
) -> Float[Array, "batch time heads head_dim"]:
  """Applies rotary position embedding in float32: Su et al. 2021 (2104.09864), eq. 34.

  In this half-split layout, channel i is rotated with channel i + head_dim / 2.

  Args:
    x: queries or keys.
    positions: position of each token in its sequence. One axis stands for several with
      equal positions.
    base: base of the frequencies; 10000 in the paper.
    scaling: scaling of the frequencies; None for none.
    axes: axis of the positions that each frequency reads; see assign_frequencies. None
      for positions with one axis.

  Raises:
    ValueError: the positions have several axes and not those of `axes`; or `axes` is
      not as long as half a head.
  """
  half = x.shape[-1] // 2
  known = 1 if axes is None else int(axes.max()) + 1
  if positions.shape[-1] not in (1, known):
    raise ValueError(
      f"positions have {positions.shape[-1]} axes, but the decoder has {known}: set "
      "its `mrope` to the number of frequencies of each axis"
    )
  if axes is not None and len(axes) != half:
    raise ValueError(
      f"mrope has {len(axes)} frequencies in all, but a head of width {x.shape[-1]} "
      f"has {half}"
    )
  at = positions[..., :1]
  for axis in range(1, positions.shape[-1]):  # A gather would not be fused.
    at = jnp.where(axes == axis, positions[..., axis : axis + 1], at)
  frequency = float(base) ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is not None:
    frequency = scale_frequencies(frequency, scaling)
  angle = at[..., None, :] * frequency
  return rotate_halves(x, jnp.sin(angle), jnp.cos(angle))


def rotate_halves(
  x: Float[Array, "*batch time heads head_dim"],
  sin: Float[AnyArray, "*#batch time 1 angles"],
  cos: Float[AnyArray, "*#batch time 1 angles"],
) -> Float[Array, "*batch time heads head_dim"]:
  """Rotates channel i with channel i + head_dim / 2 by angles, in float32."""
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return rotated.astype(x.dtype)


def scale_frequencies(
  frequency: Float[Array, " channels"], scaling: RopeScaling
) -> Float[Array, " channels"]:
  """Scales rotary frequencies for a longer context.

  "linear" is position interpolation: Chen et al. 2023 (2306.15595), eq. 4. "llama3"
  interpolates only low frequencies, with a smooth transition, as Llama 3.1 does.

  Raises:
    ValueError: the kind is unknown.
  """
  if scaling.kind == "linear":
    return frequency / scaling.factor
  if scaling.kind != "llama3":
    raise ValueError(f'kind must be "linear" or "llama3", not {scaling.kind!r}')
  turns = scaling.context * frequency / (2 * jnp.pi)
  share = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
  return (1 - share) * frequency / scaling.factor + share * frequency
