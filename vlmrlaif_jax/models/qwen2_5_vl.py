"""Qwen2.5-VL (Bai et al. 2025, 2502.13923): a vision tower with window attention.

As in qwen3_vl.py, the tower reads temporal patches, each of which is encoded on its
own, and a model is compiled once for each grid. Most layers attend within windows of a
temporal patch. Windows at the edges may be smaller, so they are padded.

The language model is Qwen2 with three position axes; see LLM_VARIANTS.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.models.decoders import qwen2
from vlmrlaif_jax.models.layers import (
  Dense,
  DTypes,
  HiddenStates,
  Layer,
  RMSNorm,
  TowerShape,
  VisualFeatures,
  measure_patch_tower,
  read_fields,
)
from vlmrlaif_jax.models.ops.attention import attend
from vlmrlaif_jax.models.ops.patch_grids import (
  axial_angles,
  name_parts,
  read_rope_sections,
  rotate,
)
from vlmrlaif_jax.models.ops.temporal_tower import (
  PATCH_FRAMES,
  StateMergers,
  TemporalTower,
)
from vlmrlaif_jax.models.projector import Connector
from vlmrlaif_jax.models.vlm import VLM

_shape = lambda out, mlp: dict(
  embed=1280, mlp=mlp, layers=32, heads=16, out=out, full_layers=(7, 15, 23, 31)
)

# Sizes of vision towers, by the size of the language model.
VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": dict(
    embed=32, mlp=48, layers=4, heads=2, out=32, full_layers=(1, 3), patch=4, window=24
  ),
  "3b": _shape(2048, 3420),
  "7b": _shape(3584, 3420),
  "32b": _shape(5120, 3456),
  "72b": _shape(8192, 3456),
}

DECODER = qwen2  # Module of the language model.

# Sizes of language models, as settings of decoder.Decoder.
LLM_VARIANTS = {name: qwen2.VARIANTS[name] for name in ("3b", "7b", "32b", "72b")}

# Neighboring frequencies of a head that belong to the time, height and width axis.
ROPE_SECTIONS = (16, 24, 24)

# Names of other fields of Model in a config.json.
TOP_CONFIG: dict[str, str] = {}

# Names of the fields of Model in "vision_config" of a Hugging Face config.json.
CONFIG = {
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "depth",
  "heads": "num_heads",
  "patch": "patch_size",
  "merge": "spatial_merge_size",
  "window": "window_size",
  "full_layers": "fullatt_block_indexes",
  "out": "out_hidden_size",
}

# Shardings of parameters over the mesh: the first pattern that matches applies.
SHARDING = (
  # A shard of the joint columns of q, k and v would not contain whole heads, and the
  # width of the MLP of 3b and 7b is no multiple of 8.
  (r"blocks/(qkv|mlp_gate|mlp_up)/kernel", P(None, ("fsdp", "tensor"))),
  (r"blocks/o/kernel", P(None, "tensor", "fsdp")),
  (r"blocks/mlp_down/kernel", P(None, None, ("fsdp", "tensor"))),
  (r"blocks/\w+/bias", P()),
  (r"patch/kernel", P(None, "tensor")),
  (r"merger/fc1/kernel", P("fsdp", "tensor")),
  (r"merger/fc2/kernel", P("tensor", "fsdp")),
  (r"(fc1|fc2)/bias", P()),
  (r"norm\d?/scale", P()),
)

# Sources of parameters in a Hugging Face checkpoint, after "visual."; see
# qwen3_vl.HF_VISION.
HF_VISION = {
  "patch/kernel": ("patch_embed.proj.weight", "conv3d"),
  **{f"blocks/{x}/scale": (f"blocks.{{}}.{x}.weight", "") for x in ("norm1", "norm2")},
  "merger/norm/scale": ("merger.ln_q.weight", ""),
  **{
    f"{module}/{leaf}": (f"{source}.{name}", op)
    for module, source in (
      ("blocks/qkv", "blocks.{}.attn.qkv"),
      ("blocks/o", "blocks.{}.attn.proj"),
      ("blocks/mlp_gate", "blocks.{}.mlp.gate_proj"),
      ("blocks/mlp_up", "blocks.{}.mlp.up_proj"),
      ("blocks/mlp_down", "blocks.{}.mlp.down_proj"),
      ("merger/fc1", "merger.mlp.0"),
      ("merger/fc2", "merger.mlp.2"),
    )
    for leaf, name, op in (("kernel", "weight", "T"), ("bias", "bias", ""))
  },
}


# Sources of all parameters, as transformers names them.
HF = name_parts(HF_VISION, qwen2.HF)

# Patterns of names in published checkpoints -> names as in HF.
RENAMES = (
  (r"^visual\.", "model.visual."),
  (r"^model\.(?=layers|embed_tokens|norm)", "model.language_model."),
)

# Modules of the tower that model.train_merger makes a part of the projector, and their
# names in transformers.
MERGERS = {"merger": "merger"}

# Values that a config must have, by its part.
REQUIRED: dict[str, dict[str, Any]] = {
  "text_config": dict(hidden_act="silu", use_sliding_window=False),
  "vision_config": dict(
    hidden_act="silu",
    in_channels=3,
    temporal_patch_size=PATCH_FRAMES,
    rope_parameters={"rope_type": "axial", "rope_theta": 10_000.0},
  ),
}


def list_windows(
  cells: tuple[int, int], side: int
) -> Int[np.ndarray, "windows window_cells"]:
  """Returns the cells of each window, as indices in raster order; -1 is padding.

  >>> print(list_windows((2, 3), side=2))
  [[ 0  1  3  4]
   [ 2 -1  5 -1]]

  Args:
    cells: rows and columns of the squares of patches that are merged.
    side: rows and columns of a window, in cells.
  """
  height, width = (min(side, size) for size in cells)  # Of a window.
  indices = np.arange(cells[0] * cells[1]).reshape(cells)
  more = [(0, -cells[0] % height), (0, -cells[1] % width)]
  padded = np.pad(indices, more, constant_values=-1)
  windows = padded.reshape(-1, height, padded.shape[1] // width, width)
  return windows.swapaxes(1, 2).reshape(-1, height * width)


class WindowBlock(Layer):
  """A pre-norm layer: attention and a gated MLP, each with a residual connection."""

  heads: int
  mlp: int  # Width of the MLP.
  eps: float  # Epsilon of RMSNorm.

  @nn.compact
  def __call__(
    self,
    x: HiddenStates,
    angles: Float[np.ndarray, "time angles"],
    real: Bool[np.ndarray, "windows window_time"],
    full: Bool[Array, ""],
  ) -> HiddenStates:
    """Computes the hidden states of patches in the order of their windows.

    Args:
      x: hidden states of all windows of an image, one window after the other.
      angles: rotary angles of the patches.
      real: False at padding.
      full: whether patches attend to the whole image instead of their window.
    """
    dense = functools.partial(Dense, bias=True, **self.types)
    norm = functools.partial(RMSNorm, self.eps, self.param_dtype)
    embed = x.shape[-1]

    h = dense(3 * embed, name="qkv")(norm(name="norm1")(x))
    h = h.reshape(*x.shape[:2], 3, self.heads, -1)
    q, k, v = (h[:, :, i] for i in range(3))
    whole, windows = (
      functools.partial(_attend, real=r) for r in (real.reshape(1, -1), real)
    )
    h = jax.lax.cond(full, whole, windows, rotate(q, angles), rotate(k, angles), v)
    x = x + dense(embed, name="o")(h.reshape(x.shape))

    h = norm(name="norm2")(x)
    # Other names than those of a language model, whose shardings do not divide them.
    gate = nn.silu(dense(self.mlp, name="mlp_gate")(h))
    return x + dense(embed, name="mlp_down")(gate * dense(self.mlp, name="mlp_up")(h))


def _attend(q, k, v, *, real):
  """Attends within each row of `real`, to what is not padding."""
  images, (parts, time) = len(q), real.shape
  split = lambda x: x.reshape(images * parts, time, *x.shape[2:])
  mask = None
  if not real.all():
    mask = jnp.broadcast_to(real[None, :, None], (images, parts, time, time))
    mask = mask.reshape(-1, time, time)
  k, v = split(k).swapaxes(1, 2), split(v).swapaxes(1, 2)
  return attend(split(q), k, v, mask).reshape(q.shape)


class PatchMerger(Layer):
  """An MLP over squares of patches, which returns one feature for each square."""

  square: int  # Patches of a square.
  out: int  # Width of the features.
  eps: float  # Epsilon of RMSNorm.

  @nn.compact
  def __call__(
    self, x: Float[Array, "images patches embed"]
  ) -> Float[Array, "images tokens out"]:
    width = self.square * x.shape[-1]
    x = RMSNorm(self.eps, self.param_dtype, name="norm")(x)
    x = Dense(width, bias=True, name="fc1", **self.types)(x.reshape(len(x), -1, width))
    return Dense(self.out, bias=True, name="fc2", **self.types)(nn.gelu(x, False))


class Mergers(StateMergers, kw_only=True):
  """The merger of hidden states, or the projector of a run that trains it."""

  def setup(self):
    self.merger = PatchMerger(self.merge**2, self.out, self.eps, **self.types)

  def merge_patches(
    self, states: Float[Array, "states images patches embed"]
  ) -> VisualFeatures:
    return VisualFeatures(self.merger(states[-1]))


class Model(Mergers, TemporalTower, kw_only=True):
  """A vision tower that returns features of temporal patches."""

  mlp: int  # Width of the MLP.
  layers: int  # Number of layers.
  heads: int  # Attention heads.
  full_layers: tuple[int, ...]  # Layers without windows.
  patch: int = 14  # Side of a patch, in pixels.
  window: int = 112  # Side of a window, in pixels.

  def setup(self):
    if self.merges:
      super().setup()
    self.patch_kernel = Dense(self.embed, name="patch", **self.types)
    self.blocks = WindowBlock(self.heads, self.mlp, self.eps, **self.types)

  def measure(self, grid: tuple[int, int]) -> TowerShape:
    """Returns the sizes of the tower for a temporal patch."""
    patches, inputs = math.prod(grid), 3 * PATCH_FRAMES * self.patch**2
    window = min(patches, (self.window // self.patch) ** 2)
    full = len(self.full_layers) / self.layers
    square = self.merge**2 * self.embed
    merged = self.merges * patches // self.merge**2 * square * (square + self.out)
    # The MLP is gated, and most layers attend within windows.
    return measure_patch_tower(self, patches, inputs, merged)._replace(
      kernels=self.embed * (4 * self.embed + 3 * self.mlp),
      pairs=patches * (full * patches + (1 - full) * window),
    )

  def encode(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "states images patches embed"]:
    square = self.merge**2
    cells = grid[0] // self.merge, grid[1] // self.merge
    order = list_windows(cells, self.window // self.patch // self.merge)

    def sort(x):
      """Brings patches to the order of windows; padding repeats the first cell."""
      x = x.reshape(*x.shape[:-2], -1, square, x.shape[-1])
      x = x[..., np.maximum(order.ravel(), 0), :, :]
      return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    angles = sort(axial_angles(grid, self.merge, self.embed // self.heads))
    real = np.repeat(order >= 0, square, axis=1)
    full = np.isin(np.arange(self.layers), self.full_layers)
    scan = nn.scan(
      lambda block, x, full: (block(x, angles, real, full), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
    )
    x, _ = scan(self.blocks, sort(self.patch_kernel(pixels)), jnp.asarray(full))
    places = np.flatnonzero(order >= 0)[np.argsort(order[order >= 0])]
    x = x.reshape(len(x), -1, square, self.embed)[:, places]
    return x.reshape(1, len(x), -1, self.embed)


def make_model(
  config: Mapping[str, Any], dtype: str, train_merger: bool = False
) -> VLM:
  """Builds the model of a config.json; see qwen3_vl.make_model."""
  text, types = config["text_config"], DTypes(dtype=dtype, param_dtype=dtype)
  fields = read_fields(CONFIG, config["vision_config"])
  cell = fields["patch"] * fields["merge"]
  if fields["window"] <= 0 or fields["window"] % cell:
    raise ValueError(
      f"vision_config.window_size must be a multiple of {cell}, the side of a square "
      f"of merged patches, got {fields['window']}. Give the config.json of the weights."
    )
  tower = Model(
    **{**fields, "full_layers": tuple(fields["full_layers"])},
    merges=not train_merger,
    **types,
  )
  projector: nn.Module = Connector(tower.out)
  if train_merger:
    projector = Mergers(out=tower.out, merge=tower.merge, eps=tower.eps, dtype=dtype)
  decoder = qwen2.Model(
    **read_fields(qwen2.CONFIG, text),
    mrope=read_rope_sections(config, ROPE_SECTIONS),
    **types,
  )
  return VLM(tower, projector, decoder)
