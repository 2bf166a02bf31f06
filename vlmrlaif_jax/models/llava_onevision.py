"""LLaVA-OneVision (Li et al. 2024, 2408.03326): SigLIP, an MLP and bilinear pooling.

Each frame of a video is encoded on its own and pooled to about a quarter of its
patches. An image is cut into crops, which are not pooled. LLaVA-Video (Zhang et al.
2024, 2410.02713) differs in the places of the newline, an embedding that ends parts of
a video.

The language model is Qwen2; see LLM_VARIANTS.
"""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vlmrlaif_jax.models import projector, siglip
from vlmrlaif_jax.models.clip import CLIP_ACTIVATIONS
from vlmrlaif_jax.models.decoders import qwen2
from vlmrlaif_jax.models.layers import (
  DTypes,
  Layer,
  TowerShape,
  VisualFeatures,
  describe_settings,
  measure_patch_tower,
  read_fields,
)
from vlmrlaif_jax.models.ops.pooling import POOLINGS, list_identity, pool_patches
from vlmrlaif_jax.models.projector import PROJECTOR_ACTIVATIONS
from vlmrlaif_jax.models.vlm import VLM

_SOURCES = 4  # Patches that a pooled feature depends on.

# The tower is SigLIP without its last layer.
_so400m = {**siglip.VARIANTS["so400m_384"], "layers": 26}

# Sizes of vision towers, by the size of the language model.
VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": dict(**siglip.VARIANTS["tiny"], out=32),
  "0.5b": dict(**_so400m, out=896),
  "7b": dict(**_so400m, out=3584),
}

# Sizes of language models, as settings of decoder.Decoder. The tokens of images and
# videos are added to the vocabulary of Qwen2.
LLM_VARIANTS: dict[str, dict[str, Any]] = {
  "0.5b": {**qwen2.VARIANTS["0.5b"], "vocab": 152_000},
  "7b": {**qwen2.VARIANTS["7b"], "vocab": 152_128},
}

# Neighboring frequencies of a head for each of several position axes, of which there is
# one, and names of other fields of Model in a config.json.
DECODER, ROPE_SECTIONS = qwen2, ()
TOP_CONFIG: dict[str, str] = {}

# Names of the fields of Model in "vision_config" of a Hugging Face config.json.
CONFIG = siglip.CONFIG

# Shardings of parameters over the mesh: the first pattern that matches applies.
SHARDING = ((r"merger/newline", P()), *projector.SHARDING, *siglip.SHARDING)

# Modules of the tower that model.train_merger makes a part of the projector, and their
# names in transformers.
MERGERS = {"merger": "multi_modal_projector"}

# Sources of all parameters, as published checkpoints name them; see llama.HF.
HF = {
  **{
    f"vision/tower/{path}": (f"vision_tower.vision_model.{name}", op)
    for path, (name, op) in siglip.HF_VISION.items()
  },
  **{
    f"vision/merger/mlp/{path}": (f"multi_modal_projector.{name}", op)
    for path, (name, op) in projector.HF.items()
  },
  "vision/merger/newline": ("image_newline", ""),
  **{
    f"llm/{path}": (f"language_model.{name}", op)
    for path, (name, op) in qwen2.HF.items()
  },
}

# Patterns of names in other checkpoints -> names as in HF. transformers 4.52 and later
# has other names in memory, and 5 on disk.
RENAMES: tuple[tuple[str, str], ...] = (
  (r"^model\.(?=language_model|vision_tower|multi_modal|image_newline)", ""),
  (r"^lm_head\.", "language_model.lm_head."),
  (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
  (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)

# Values that a config must have, by its part.
REQUIRED: dict[str, dict[str, Any]] = {
  "text_config": dict(model_type="qwen2", hidden_act="silu"),
  "vision_config": dict(model_type="siglip_vision_model", num_channels=3),
}

# Places of the newline: at the end of a video, of each frame, or of each row of the
# features of a frame. The names are those of the LLaVA repository.
NEWLINES = ("one_token", "frame", "grid")


def append_newlines(
  x: Float[Array, "images rows columns features"],
  newline: Float[Array, " features"],
  *,
  each_row: bool,
) -> Float[Array, "images tokens features"]:
  """Flattens rows and columns, and appends the newline to each row or to the last."""
  images, rows, columns, _ = x.shape
  if not each_row:
    rows, columns = 1, rows * columns
  x = x.reshape(images, rows, columns, -1)
  end = jnp.broadcast_to(newline.astype(x.dtype), (images, rows, 1, x.shape[-1]))
  return jnp.concatenate([x, end], axis=2).reshape(images, -1, x.shape[-1])


class NewlineMerger(Layer):
  """The MLP from patches to the width of the language model, and the newline."""

  out: int  # Width of the language model's embeddings.
  activation: str = "gelu"  # A key of PROJECTOR_ACTIVATIONS.

  def setup(self):
    self.mlp = projector.Projector(self.out, self.activation, **self.types)
    init = nn.initializers.normal(self.out**-0.5)
    self.newline = self.param("newline", init, (self.out,), self.param_dtype)

  def __call__(
    self, x: Float[Array, "images patches embed"]
  ) -> tuple[Float[Array, "images patches out"], Float[Array, " out"]]:
    """Returns projected patches and the newline."""
    return self.mlp(x), jnp.asarray(self.newline)


class SourceConnector(nn.Module):
  """The projector of a tower without a merger, which merges sources; see Model."""

  merger: NewlineMerger

  def connect(self, features: Float[Array, "batch tokens features"]) -> VisualFeatures:
    """Projects and pools the sources that `Model.features` joined."""
    channels = features.shape[-1] - _SOURCES - 1
    parts = jnp.split(features, [channels, channels + _SOURCES], axis=-1)
    sources, weights, is_newline = parts
    batch, tokens, _ = features.shape
    projected, newline = self.merger(
      sources.reshape(batch, tokens * _SOURCES, channels // _SOURCES)
    )
    merged = jnp.einsum(
      "bts,btse->bte",
      weights.astype(jnp.float32),
      projected.reshape(batch, tokens, _SOURCES, -1).astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    merged += is_newline.astype(jnp.float32) * newline.astype(jnp.float32)
    return VisualFeatures(merged.astype(projected.dtype))


class Model(Layer, kw_only=True):
  """A vision tower that returns features of frames or of crops of images."""

  image: int  # Side of a frame or crop, in pixels.
  patch: int  # Side of a patch, in pixels.
  embed: int  # Width of hidden states.
  mlp: int  # Width of the MLP.
  layers: int  # Number of layers.
  heads: int  # Attention heads.
  out: int  # Width of the features, which is that of the language model.
  activation: str = "gelu_pytorch_tanh"  # A key of CLIP_ACTIVATIONS.
  eps: float = 1e-6  # Epsilon of layer norms.
  select_layer: int | tuple[int, ...] = -1  # See clip.VisionTower.
  projector_activation: str = "gelu"  # A key of PROJECTOR_ACTIVATIONS.
  pool: str = "bilinear"  # A key of POOLINGS.
  newline: str = "one_token"  # One of NEWLINES.
  # Whether features are merged. If not, those of a token are the hidden states of its
  # sources, their weights, and whether it is the newline; see SourceConnector.
  merges: bool = True

  def setup(self):
    self.tower = siglip.Model(
      image=self.image,
      patch=self.patch,
      embed=self.embed,
      mlp=self.mlp,
      layers=self.layers,
      heads=self.heads,
      activation=self.activation,
      eps=self.eps,
      select_layer=self.select_layer,
      **self.types,
    )
    if self.merges:
      self.merger = NewlineMerger(self.out, self.projector_activation, **self.types)

  @property
  def side(self) -> int:
    """Rows and columns of the patches of a frame or crop."""
    return self.image // self.patch

  @property
  def pooled_side(self) -> int:
    """Rows and columns of the pooled features of a frame."""
    return len(POOLINGS[self.pool](self.side)[0])

  @property
  def channels(self) -> int:
    """Width of the features of a patch before the merger."""
    layers = self.select_layer
    return self.embed * (len(layers) if isinstance(layers, tuple) else 1)

  @property
  def feature_shape(self) -> tuple[int, ...]:
    """Shape of the features of a token."""
    return (self.out if self.merges else _SOURCES * (self.channels + 1) + 1,)

  def measure(self, grid: tuple[int, int]) -> TowerShape:
    """Returns the sizes of the tower for a frame, whose grid is always the same."""
    del grid
    patches, inputs = (self.image // self.patch) ** 2, 3 * self.patch**2
    merged = self.merges * patches * (self.channels + self.out) * self.out
    return measure_patch_tower(self, patches, inputs, merged)

  def settings(self) -> dict[str, Any]:
    """Returns the settings that features depend on."""
    return describe_settings(self)

  def example_inputs(self) -> tuple[Any, ...]:
    """Returns inputs by which the tower is initialized."""
    pixels = jnp.zeros((1, self.side**2, 3 * self.patch**2))
    return pixels, (self.pooled_side, self.pooled_side)

  def __call__(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "images tokens features"]:
    """Computes `features`; also initializes the last norm, which they do not read."""
    if self.is_initializing():
      self.tower(jnp.zeros((1, self.image, self.image, 3)))
    return self.features(pixels, grid)

  def features(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "images tokens features"]:
    """Computes the features of frames or of crops, with a newline at the end.

    Args:
      pixels: normalized pixels of patches, in raster order. The channels are row,
        column and color.
      grid: rows and columns of the features: `side` for crops, which are not pooled,
        and `pooled_side` for frames of videos.

    Raises:
      ValueError: the grid is another one.
    """
    sides = self.pooled_side, self.side
    if grid[0] != grid[1] or grid[0] not in sides:
      raise ValueError(
        f"a grid has {sides[0]} rows and columns for frames of a video or {sides[1]} "
        f"for crops of an image, not {grid}. Use the processor of the checkpoint."
      )
    is_frame = grid[0] == sides[0]
    list_sources = POOLINGS[self.pool] if is_frame else list_identity
    hidden = self.tower.select_states(pixels)
    x, newline = self._merge(hidden, *list_sources(self.side))
    each_row = is_frame and self.newline == "grid"
    return append_newlines(x, newline, each_row=each_row)

  def _merge(
    self,
    hidden: Float[Array, "images patches embed"],
    index: Int[np.ndarray, "rows 2"],
    weight: Float[np.ndarray, "rows 2"],
  ) -> tuple[Float[Array, "images rows rows features"], Float[Array, " features"]]:
    """Returns the features of tokens and of the newline."""
    square = hidden.shape[0], self.side, self.side, -1
    if self.merges:
      x, newline = self.merger(hidden)
      return pool_patches(x.reshape(square), index, weight), newline
    rows, columns = index[:, None, :, None], index[None, :, None, :]
    sources = hidden.reshape(square)[:, rows, columns]
    weights = weight[:, None, :, None] * weight[None, :, None, :]
    last = np.zeros((*weights.shape[:2], _SOURCES + 1), np.float32)
    last[..., :_SOURCES] = weights.reshape(*weights.shape[:2], _SOURCES)
    flat = sources.reshape(*sources.shape[:3], -1)
    shape = *flat.shape[:3], last.shape[-1]
    ends = jnp.broadcast_to(jnp.asarray(last, flat.dtype), shape)
    x = jnp.concatenate([flat, ends], axis=-1)
    return x, jnp.zeros(x.shape[-1], x.dtype).at[-1].set(1)


def make_model(
  config: Mapping[str, Any], dtype: str, train_merger: bool = False
) -> VLM:
  """Builds the model of a config.json.

  Args:
    config: The config, with the defaults of transformers. It may also have the keys
      mm_spatial_pool_mode and mm_newline_position of the LLaVA repository.
    dtype: Dtype of the computation and of frozen parameters.
    train_merger: Whether the merger is the projector, which SFT trains.

  Raises:
    ValueError: The config has a value that the layers do not support.
  """
  _check_values(config)
  text, vision = config["text_config"], config["vision_config"]
  layers = config["vision_feature_layer"]
  types = DTypes(dtype=dtype, param_dtype=dtype)
  out, activation = text["hidden_size"], config["projector_hidden_act"]
  tower = Model(
    **read_fields(CONFIG, vision),
    out=out,
    select_layer=tuple(layers) if isinstance(layers, list) else layers,
    projector_activation=activation,
    pool=config.get("mm_spatial_pool_mode", Model.pool),
    newline=config.get("mm_newline_position", Model.newline),
    merges=not train_merger,
    **types,
  )
  connector: nn.Module = projector.Connector(out)
  if train_merger:
    connector = SourceConnector(NewlineMerger(out, activation, dtype=dtype))
  return VLM(tower, connector, qwen2.Model(**read_fields(qwen2.CONFIG, text), **types))


def _check_values(config: Mapping[str, Any]) -> None:
  """Raises ValueError if the layers do not support a value."""
  text, vision = config["text_config"], config["vision_config"]
  layers, count = config["vision_feature_layer"], vision["num_hidden_layers"]
  each = layers if isinstance(layers, list) else [layers]
  supported: dict[str, tuple[Any, Collection[Any]]] = {
    "vision_feature_select_strategy": (
      config["vision_feature_select_strategy"],
      ["full"],
    ),
    "multimodal_projector_bias": (config["multimodal_projector_bias"], [True]),
    "use_image_newline_parameter": (
      config.get("use_image_newline_parameter", True),
      [True],
    ),
    "projector_hidden_act": (config["projector_hidden_act"], PROJECTOR_ACTIVATIONS),
    "vision_config.hidden_act": (vision["hidden_act"], CLIP_ACTIVATIONS),
    "text_config.rope_parameters.rope_type": (
      text["rope_parameters"].get("rope_type", "default"),
      ["default"],
    ),
    "text_config.use_sliding_window": (
      "sliding_attention" in (text.get("layer_types") or ()),
      [False],
    ),
    "mm_spatial_pool_mode": (config.get("mm_spatial_pool_mode", Model.pool), POOLINGS),
    "mm_newline_position": (
      config.get("mm_newline_position", Model.newline),
      NEWLINES,
    ),
    **{f"vision_feature_layer {x}": (x, range(-count - 1, count + 1)) for x in each},
  }
  for name, (value, values) in supported.items():
    if value not in values:
      known = values if isinstance(values, range) else sorted(values)
      raise ValueError(
        f"{name} must be one of {known}, got {value!r}. Give another checkpoint."
      )
