"""SmolVLM2 (Marafioti et al. 2025, 2504.05299): SigLIP, merged patches and a Llama.

The tower reads squares of one size: frames of videos, and crops of images. Squares of
neighboring patches become one token. Each square is encoded on its own.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vlmrlaif_jax.models import siglip
from vlmrlaif_jax.models.clip import CLIP_ACTIVATIONS
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.layers import (
  Dense,
  DTypes,
  Layer,
  TowerShape,
  VisualFeatures,
  describe_settings,
  measure_patch_tower,
  read_fields,
)
from vlmrlaif_jax.models.projector import Connector
from vlmrlaif_jax.models.vlm import VLM

_base = dict(image=512, patch=16, embed=768, mlp=3072, layers=12, heads=12, merge=4)
_so400m = {**siglip.VARIANTS["so400m_384"], "merge": 3}

# Sizes of vision towers, by the size of the model.
VARIANTS: dict[str, dict[str, Any]] = {
  # As in 2.2b, the image is no multiple of a patch and its margin is cut off.
  "tiny": {**siglip.VARIANTS["tiny"], "merge": 2, "out": 32},
  "256m": {**_base, "out": 576},
  "500m": {**_base, "out": 960},
  "2.2b": {**_so400m, "out": 2048},
}

# Sizes of language models, as settings of decoder.Decoder.
_llm = lambda embed, mlp, layers, heads, kv_heads, rope_base: dict(
  vocab=49_280,
  embed=embed,
  mlp=mlp,
  layers=layers,
  heads=heads,
  kv_heads=kv_heads,
  rope_base=rope_base,
)
LLM_VARIANTS: dict[str, dict[str, Any]] = {
  "256m": _llm(576, 1536, 30, 9, 3, 1e5),
  "500m": _llm(960, 2560, 32, 15, 5, 1e5),
  "2.2b": _llm(2048, 8192, 24, 32, 32, 273_768.0),
}

# Neighboring frequencies of a head for each of several position axes, of which there is
# one, and names of other fields of Model in a config.json.
DECODER, ROPE_SECTIONS = llama, ()
TOP_CONFIG: dict[str, str] = {"merge": "scale_factor"}

# Names of the fields of Model in "vision_config" of a Hugging Face config.json.
CONFIG = siglip.CONFIG

# Shardings of parameters over the mesh: the first pattern that matches applies.
SHARDING = ((r"merger/kernel", P("fsdp", "tensor")), *siglip.SHARDING)

# Sources of all parameters, as transformers names them; see llama.HF.
HF = {
  **{
    f"vision/tower/{path}": (f"model.vision_model.{name}", op)
    for path, (name, op) in siglip.HF_VISION.items()
  },
  "vision/merger/kernel": ("model.connector.modality_projection.proj.weight", "T"),
  **{
    f"llm/{path}": (name.replace("model.", "model.text_model.", 1), op)
    for path, (name, op) in llama.HF.items()
  },
}

# Patterns of names in published checkpoints -> names as in HF.
RENAMES: tuple[tuple[str, str], ...] = ()

# Modules of the tower that model.train_merger makes a part of the projector, and their
# names in transformers.
MERGERS = {"merger": "modality_projection"}

# Values that a config must have, by its part.
REQUIRED: dict[str, dict[str, Any]] = {
  "text_config": dict(
    model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False
  ),
  "vision_config": dict(num_channels=3),
}


class Mergers(Layer, kw_only=True):
  """The linear layer of merged patches, and the projector of a run that trains it."""

  out: int  # Width of the features, which is that of the language model.

  def setup(self):
    self.merger = Dense(self.out, **self.types)

  def connect(self, features: Float[Array, "batch tokens channels"]) -> VisualFeatures:
    """Projects squares of hidden states; see `join_squares`."""
    return VisualFeatures(self.merger(features))


class Model(Mergers, kw_only=True):
  """A vision tower that returns features of frames and of images."""

  image: int  # Height and width of a frame or a crop, in pixels.
  patch: int  # Side of a patch, in pixels.
  embed: int  # Width of hidden states.
  mlp: int  # Width of the MLP.
  layers: int  # Number of layers.
  heads: int  # Attention heads.
  merge: int  # Side of the squares of patches that are merged.
  activation: str = "gelu_pytorch_tanh"  # A key of CLIP_ACTIVATIONS.
  eps: float = 1e-6  # Epsilon of layer norms.
  merges: bool = True  # Whether the tower has the merger, and not the projector.

  def setup(self):
    if self.merges:
      super().setup()
    self.tower = siglip.Model(
      **{field: self.__dict__[field] for field in CONFIG}, **self.types
    )

  def __call__(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "images tokens features"]:
    """Computes features; see the method `features`."""
    return self.features(pixels, grid)

  @property
  def feature_shape(self) -> tuple[int, ...]:
    """Shape of the features of a token."""
    return (self.out if self.merges else self.merge**2 * self.embed,)

  def measure(self, grid: tuple[int, int]) -> TowerShape:
    """Returns the sizes of the tower for a frame, whose grid is always the same."""
    del grid
    patches, inputs = (self.image // self.patch) ** 2, 3 * self.patch**2
    merged = self.merges * patches * self.embed * self.out
    return measure_patch_tower(self, patches, inputs, merged)

  def settings(self) -> dict[str, Any]:
    """Returns the settings that features depend on."""
    return describe_settings(self)

  def example_inputs(self) -> tuple[Any, ...]:
    """Returns inputs by which the tower is initialized."""
    side = self.image // self.patch
    return jnp.zeros((1, side**2, 3 * self.patch**2)), (side, side)

  def features(
    self, pixels: Float[Array, "images patches channels"], grid: tuple[int, int]
  ) -> Float[Array, "images tokens features"]:
    """Computes the features of frames, or of images with all their crops.

    Args:
      pixels: normalized pixels of patches by cut_squares of the processor. An image has
        the patches of one crop after the other.
      grid: rows and columns of patches. Those of an image include all crops.
    """
    squares = (self.image // self.patch) ** 2
    crops = pixels.reshape(len(pixels), -1, squares, pixels.shape[-1])
    if crops.shape[1] == 1:
      return self.encode(crops[:, 0])
    # One crop after the other, so that images take no more memory than frames.
    model, variables = self.clone(parent=None), self.variables
    encode = lambda crop: model.apply(variables, crop, method="encode")
    features = jax.lax.map(encode, crops.swapaxes(0, 1)).swapaxes(0, 1)
    return features.reshape(len(pixels), -1, features.shape[-1])

  def encode(
    self, squares: Float[Array, "squares patches channels"]
  ) -> Float[Array, "squares tokens features"]:
    """Computes the features of squares; without the merger, joined hidden states."""
    states = join_squares(self.tower.encode_patches(squares), self.merge)
    return self.connect(states).merged if self.merges else states


def join_squares(
  states: Float[Array, "images patches channels"], merge: int
) -> Float[Array, "images tokens joined"]:
  """Joins the hidden states of squares of merge x merge patches: a pixel shuffle."""
  images, patches, channels = states.shape
  side = round(patches**0.5) // merge
  x = states.reshape(images, side, merge, side, merge, channels)
  return x.swapaxes(2, 3).reshape(images, side**2, -1)


def make_model(
  config: Mapping[str, Any], dtype: str, train_merger: bool = False
) -> VLM:
  """Builds the model of a config.json; see qwen3_vl.make_model.

  Raises:
    ValueError: The config has a value that the layers do not support.
  """
  text, vision, merge = (
    config[key] for key in ("text_config", "vision_config", "scale_factor")
  )
  if vision["hidden_act"] not in CLIP_ACTIVATIONS:
    raise ValueError(
      f"vision_config.hidden_act must be one of {sorted(CLIP_ACTIVATIONS)}, "
      f"got {vision['hidden_act']!r}. Give another checkpoint."
    )
  side = vision["image_size"] // vision["patch_size"]
  if side % merge:
    raise ValueError(
      f"scale_factor={merge} must divide the {side} patches of a side "
      "(vision_config.image_size / patch_size). Give the config.json of the weights."
    )
  if (kind := text["rope_parameters"].get("rope_type", "default")) != "default":
    raise ValueError(
      f"text_config.rope_parameters must have the rope_type 'default', got {kind!r}. "
      "Give another checkpoint."
    )
  types, out = DTypes(dtype=dtype, param_dtype=dtype), text["hidden_size"]
  tower = Model(
    **read_fields(CONFIG, vision),
    merge=merge,
    out=out,
    merges=not train_merger,
    **types,
  )
  projector: nn.Module = Connector(out)
  if train_merger:
    projector = Mergers(out=out, dtype=dtype)
  return VLM(tower, projector, llama.Model(**read_fields(llama.CONFIG, text), **types))
