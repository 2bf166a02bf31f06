"""Qwen3-VL (Bai et al. 2025, 2511.21631): a vision tower with DeepStack features.

The tower reads temporal patches: squares of two frames. Each temporal patch is encoded
on its own, so a batch may contain temporal patches of several videos and images, if
their grids are equal. A model is compiled once for each grid.

The language model is Qwen3 with three position axes; see LLM_VARIANTS.
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
from jaxtyping import Array, Float

from vlmrlaif_jax.models.clip import CLIP_ACTIVATIONS, layer_norm
from vlmrlaif_jax.models.decoders import qwen3
from vlmrlaif_jax.models.layers import (
  Dense,
  DTypes,
  HiddenStates,
  Layer,
  TowerShape,
  VisualFeatures,
  measure_patch_tower,
  read_fields,
)
from vlmrlaif_jax.models.ops.attention import attend
from vlmrlaif_jax.models.ops.patch_grids import (
  axial_angles,
  interpolate,
  name_parts,
  order_patches,
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

_small = dict(embed=1024, mlp=4096, layers=24, heads=16, taps=(5, 11, 17))
_large = dict(embed=1152, mlp=4304, layers=27, heads=16, taps=(8, 16, 24))

# Sizes of vision towers, by the size of the language model.
VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": dict(
    embed=32, mlp=64, layers=4, heads=2, taps=(0, 2), patch=4, positions=36, out=32
  ),
  "2b": dict(**_small, out=2048),
  "4b": dict(**_small, out=2560),
  "8b": dict(**_large, out=4096),
  "32b": dict(**_large, out=5120),
}

DECODER = qwen3  # Module of the language model.

# Sizes of language models, as settings of decoder.Decoder.
LLM_VARIANTS: dict[str, dict[str, Any]] = {
  name: {**qwen3.VARIANTS[size], "rope_base": 5e6}
  for name, size in (("2b", "1.7b"), ("4b", "4b"), ("8b", "8b"), ("32b", "32b"))
}

# Frequencies of the height and the width axis among all frequencies of a head: 1:60:3
# and 2:60:3. The time axis has the others.
ROPE_SECTIONS = (24, 20, 20)

# Names of other fields of Model in a config.json.
TOP_CONFIG: dict[str, str] = {}

# Names of the fields of Model in "vision_config" of a Hugging Face config.json.
CONFIG = {
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "depth",
  "heads": "num_heads",
  "activation": "hidden_act",
  "patch": "patch_size",
  "merge": "spatial_merge_size",
  "positions": "num_position_embeddings",
  "taps": "deepstack_visual_indexes",
  "out": "out_hidden_size",
}

# Shardings of parameters over the mesh: the first pattern that matches applies.
SHARDING = (
  # A shard of the joint columns of q, k and v would not contain whole heads.
  (r"blocks/qkv/kernel", P(None, ("fsdp", "tensor"))),
  (r"blocks/fc1/kernel", P(None, "fsdp", "tensor")),
  (r"blocks/fc1/bias", P(None, "tensor")),
  (r"blocks/(o|fc2)/kernel", P(None, "tensor", "fsdp")),
  (r"blocks/\w+/bias", P()),
  (r"patch/kernel", P(None, "tensor")),
  (r"(^|/)merger/fc1/kernel", P("fsdp", "tensor")),
  (r"(^|/)merger/fc2/kernel", P("tensor", "fsdp")),
  (r"deepstack_mergers/fc1/kernel", P(None, "fsdp", "tensor")),
  (r"deepstack_mergers/fc2/kernel", P(None, "tensor", "fsdp")),
  (r"(patch|fc1|fc2)/bias", P()),
  (r"norm\d?/(scale|bias)", P()),
  (r"position_embedding", P()),
)


def _name(modules: dict[str, str], ours: str, theirs: str):
  """Returns the sources of the matrices, biases and norms of some modules."""
  return {
    f"{ours}/{module}/{leaf}": (f"{theirs}.{source}.{name}", op)
    for module, source in modules.items()
    for leaf, name, op in (
      ("scale", "weight", "") if "norm" in module else ("kernel", "weight", "T"),
      ("bias", "bias", ""),
    )
  }


_MERGER = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
_BLOCK = {
  "norm1": "norm1",
  "qkv": "attn.qkv",
  "o": "attn.proj",
  "norm2": "norm2",
  "fc1": "mlp.linear_fc1",
  "fc2": "mlp.linear_fc2",
}

# Sources of parameters in a Hugging Face checkpoint, after "model.visual."; see
# llama.HF. "conv3d" reshapes a convolution to the matrix that patches are multiplied
# with.
HF_VISION = {
  "patch/kernel": ("patch_embed.proj.weight", "conv3d"),
  "patch/bias": ("patch_embed.proj.bias", ""),
  "position_embedding": ("pos_embed.weight", ""),
  **_name(_BLOCK, "blocks", "blocks.{}"),
  **_name(_MERGER, "merger", "merger"),
  **_name(_MERGER, "deepstack_mergers", "deepstack_merger_list.{}"),
}

# Sources of all parameters, as transformers names them.
HF = name_parts(HF_VISION, qwen3.HF)

# Patterns of names in published checkpoints -> names as in HF.
RENAMES: tuple[tuple[str, str], ...] = ()

# Modules of the tower that model.train_merger makes a part of the projector, and their
# names in transformers.
MERGERS = {"merger": "merger", "deepstack_mergers": "deepstack_merger_list"}

# Values that a config must have, by its part.
REQUIRED: dict[str, dict[str, Any]] = {
  "text_config": dict(hidden_act="silu", attention_bias=False),
  "vision_config": dict(in_channels=3, temporal_patch_size=PATCH_FRAMES),
}


class VisionBlock(Layer):
  """A pre-norm layer: attention within an image and an MLP, each with a residual."""

  heads: int
  mlp: int  # Width of the MLP.
  activation: str  # A key of CLIP_ACTIVATIONS.
  eps: float  # Epsilon of layer norms.

  @nn.compact
  def __call__(
    self, x: HiddenStates, angles: Float[np.ndarray, "patches angles"]
  ) -> HiddenStates:
    dense = functools.partial(Dense, bias=True, **self.types)
    norm = functools.partial(layer_norm, self.eps, **self.types)
    embed = x.shape[-1]

    h = dense(3 * embed, name="qkv")(norm(name="norm1")(x))
    h = h.reshape(*x.shape[:2], 3, self.heads, -1)
    q, k, v = (h[:, :, i] for i in range(3))
    q, k = rotate(q, angles), rotate(k, angles)
    h = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), None)
    x = x + dense(embed, name="o")(h.reshape(x.shape))

    h = dense(self.mlp, name="fc1")(norm(name="norm2")(x))
    return x + dense(embed, name="fc2")(CLIP_ACTIVATIONS[self.activation](h))


class Merger(Layer):
  """An MLP over squares of patches, which returns one feature for each square."""

  merge: int  # Side of a square, in patches.
  out: int  # Width of the features.
  eps: float  # Epsilon of the layer norm.
  norm_square: bool = False  # Normalizes a square instead of each of its patches.

  @nn.compact
  def __call__(
    self, x: Float[Array, "images patches embed"]
  ) -> Float[Array, "images tokens out"]:
    norm = layer_norm(self.eps, name="norm", **self.types)
    square = self.merge**2 * x.shape[-1]
    join = lambda x: x.reshape(x.shape[0], -1, square)
    x = norm(join(x)) if self.norm_square else join(norm(x))
    x = nn.gelu(Dense(square, bias=True, name="fc1", **self.types)(x), False)
    return Dense(self.out, bias=True, name="fc2", **self.types)(x)


class Mergers(StateMergers, kw_only=True):
  """The mergers of hidden states, or the projector of a run that trains them.

  By default they are a part of the tower, and features are saved after them.
  """

  def setup(self):
    settings = (self.merge, self.out, self.eps)
    self.merger = Merger(*settings, **self.types)
    stacked = nn.vmap(Merger, variable_axes={"params": 0}, split_rngs={"params": True})
    self.deepstack_mergers = stacked(*settings, norm_square=True, **self.types)

  def merge_patches(
    self, states: Float[Array, "states images patches embed"]
  ) -> VisualFeatures:
    return VisualFeatures(self.merger(states[-1]), self.deepstack_mergers(states[:-1]))


class Model(Mergers, TemporalTower, kw_only=True):
  """A vision tower that returns features of temporal patches."""

  mlp: int  # Width of the MLP.
  layers: int  # Number of layers.
  heads: int  # Attention heads.
  activation: str = "gelu_pytorch_tanh"  # A key of CLIP_ACTIVATIONS.
  patch: int = 16  # Side of a patch, in pixels.
  positions: int = 48**2  # Rows of the position table, which is a square.

  def setup(self):
    if self.merges:
      super().setup()
    self.patch_kernel = Dense(self.embed, bias=True, name="patch", **self.types)
    self.position_embedding = self.param(
      "position_embedding",
      nn.initializers.normal(0.02),
      (self.positions, self.embed),
      self.param_dtype,
    )
    self.blocks = VisionBlock(
      self.heads, self.mlp, self.activation, self.eps, **self.types
    )

  def measure(self, grid: tuple[int, int]) -> TowerShape:
    """Returns the sizes of the tower for a temporal patch."""
    patches, inputs = math.prod(grid), 3 * PATCH_FRAMES * self.patch**2
    square = self.merge**2 * self.embed
    mergers = (1 + len(self.taps)) * square * (square + self.out)
    merged = self.merges * patches // self.merge**2 * mergers
    return measure_patch_tower(self, patches, inputs, merged)

  def encode(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "states images patches embed"]:
    x = self.patch_kernel(pixels)
    x = x + self._embed_positions(grid).astype(x.dtype)
    angles = axial_angles(grid, self.merge, self.embed // self.heads)
    last = len(self.taps)
    slots = np.full(self.layers, last)  # Where each layer writes its hidden state.
    slots[list(self.taps)] = np.arange(last)

    def layer(block, carry, slot):
      x, states = carry
      x = block(x, angles)
      return (x, jax.lax.dynamic_update_index_in_dim(states, x, slot, 0)), None

    scan = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
    )
    states = jnp.zeros((last + 1, *x.shape), x.dtype)
    (x, states), _ = scan(self.blocks, (x, states), jnp.asarray(slots))
    return states.at[last].set(x)

  def _embed_positions(self, grid: tuple[int, int]) -> Float[Array, "patches embed"]:
    """Resamples the position table bilinearly to a grid; the corners are aligned."""
    side = round(self.positions**0.5)
    table = self.position_embedding.reshape(side, side, self.embed)
    rows, columns = (interpolate(size, side) for size in grid)
    at_grid = jnp.einsum(
      "hi,wj,ijc->hwc",
      rows,
      columns,
      table.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    return order_patches(at_grid, self.merge)


def make_model(
  config: Mapping[str, Any], dtype: str, train_merger: bool = False
) -> VLM:
  """Builds the model of a config.json.

  Args:
    config: The config, with the defaults of transformers.
    dtype: Dtype of the computation and of frozen parameters.
    train_merger: Whether the mergers are the projector, which SFT trains.

  Raises:
    ValueError: The config has a value that the layers do not support.
  """
  text, vision = config["text_config"], config["vision_config"]
  if vision["hidden_act"] not in CLIP_ACTIVATIONS:
    raise ValueError(
      f"vision_config.hidden_act must be one of {sorted(CLIP_ACTIVATIONS)}, "
      f"got {vision['hidden_act']!r}. Give another checkpoint."
    )
  types = DTypes(dtype=dtype, param_dtype=dtype)
  fields = read_fields(CONFIG, vision)
  tower = Model(
    **{**fields, "taps": tuple(fields["taps"])}, merges=not train_merger, **types
  )
  projector: nn.Module = Connector(tower.out)
  if train_merger:
    projector = Mergers(
      out=tower.out, taps=tower.taps, merge=tower.merge, eps=tower.eps, dtype=dtype
    )
  decoder = qwen3.Model(
    **read_fields(qwen3.CONFIG, text),
    mrope=read_rope_sections(config, ROPE_SECTIONS),
    mrope_interleaved=True,
    **types,
  )
  return VLM(tower, projector, decoder)
