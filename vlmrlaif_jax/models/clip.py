"""CLIP (Radford et al. 2021, 2103.00020): a vision tower and a text tower."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vlmrlaif_jax.models.layers import Dense, HiddenStates, Layer, TowerShape
from vlmrlaif_jax.models.ops.attention import attend

# Sizes of vision towers.
VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": dict(image=16, patch=4, embed=32, mlp=64, layers=3, heads=4),
  "b32": dict(image=224, patch=32, embed=768, mlp=3072, layers=12, heads=12),
  "l14": dict(image=224, patch=14, embed=1024, mlp=4096, layers=24, heads=16),
  "l14_336": dict(image=336, patch=14, embed=1024, mlp=4096, layers=24, heads=16),
}

# Names of the fields of towers in a Hugging Face config.json.
TOWER_CONFIG = {
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "activation": "hidden_act",
  "eps": "layer_norm_eps",
}
CONFIG = {"image": "image_size", "patch": "patch_size", **TOWER_CONFIG}

# Shardings of parameters over the mesh: the first pattern that matches applies.
SHARDING = (
  (r"blocks/(q|k|v|fc1)/kernel", P(None, "fsdp", "tensor")),
  (r"blocks/(q|k|v|fc1)/bias", P(None, "tensor")),
  (r"blocks/(o|fc2)/kernel", P(None, "tensor", "fsdp")),
  (r"blocks/(o|fc2)/bias", P()),
  (r"token_embedding/embedding", P(None, ("fsdp", "tensor"))),
  (r"(patch|visual_projection|text_projection)/kernel", P(None, "tensor")),
  (r"norm\d?/(scale|bias)", P()),
  (r"class_embedding|position_embedding|logit_scale", P()),
)

BLOCKS_HF = {
  f"blocks/{module}/{leaf}": (f"encoder.layers.{{}}.{source}.{name}", op)
  for module, source, matrix in (
    ("norm1", "layer_norm1", "scale"),
    ("q", "self_attn.q_proj", "kernel"),
    ("k", "self_attn.k_proj", "kernel"),
    ("v", "self_attn.v_proj", "kernel"),
    ("o", "self_attn.out_proj", "kernel"),
    ("norm2", "layer_norm2", "scale"),
    ("fc1", "mlp.fc1", "kernel"),
    ("fc2", "mlp.fc2", "kernel"),
  )
  for leaf, name, op in (
    (matrix, "weight", "T" if matrix == "kernel" else ""),
    ("bias", "bias", ""),
  )
}

# Sources of parameters in a Hugging Face checkpoint; see llama.HF. "conv" reshapes the
# kernel of a convolution to the matrix that patches are multiplied with.
HF_VISION = {
  "class_embedding": ("embeddings.class_embedding", ""),
  "patch/kernel": ("embeddings.patch_embedding.weight", "conv"),
  "position_embedding": ("embeddings.position_embedding.weight", ""),
  "pre_norm/scale": ("pre_layrnorm.weight", ""),
  "pre_norm/bias": ("pre_layrnorm.bias", ""),
  **BLOCKS_HF,
  "post_norm/scale": ("post_layernorm.weight", ""),
  "post_norm/bias": ("post_layernorm.bias", ""),
}
# Mean and standard deviation of CLIP's training pixels, for red, green and blue.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

CLIP_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_pytorch_tanh": nn.gelu,
}


def cut_patches(
  pixels: Float[Array, "batch height width 3"], image: int, patch: int
) -> Float[Array, "batch patches channels"]:
  """Cuts images into squares of patch x patch pixels, in raster order.

  >>> cut_patches(jnp.zeros((1, 9, 9, 3)), image=9, patch=4).shape
  (1, 4, 48)

  Args:
    pixels: square images.
    image: required side of the images. Pixels beyond the last whole patch at the right
      and the bottom are cut off.
    patch: side of a patch.

  Raises:
    ValueError: the images have another size.
  """
  batch, height, width, _ = pixels.shape
  if (height, width) != (image, image):
    raise ValueError(
      f"images must be {image} x {image} pixels, not {height} x {width}: resize them "
      "when they are loaded"
    )
  side = image // patch
  pixels = pixels[:, : side * patch, : side * patch]
  patches = pixels.reshape(batch, side, patch, side, patch, 3)
  return patches.swapaxes(2, 3).reshape(batch, side * side, -1)


def layer_norm(
  eps: float, dtype: DTypeLike, param_dtype: DTypeLike, name: str
) -> Callable[[Float[Array, "*batch embed"]], Float[Array, "*batch embed"]]:
  """Returns a layer norm that computes in float32 and returns arrays of `dtype`."""
  norm = nn.LayerNorm(
    eps,
    dtype=jnp.float32,
    param_dtype=param_dtype,
    use_fast_variance=False,
    name=name,
  )
  return lambda x: norm(x).astype(dtype)


class EncoderBlock(Layer):
  """A pre-norm layer: attention and an MLP, each with a residual connection."""

  heads: int
  mlp: int  # Width of the MLP.
  activation: str  # A key of CLIP_ACTIVATIONS.
  eps: float  # Epsilon of layer norms.

  @nn.compact
  def __call__(
    self, x: HiddenStates, mask: Bool[Array, "batch time time"] | None = None
  ) -> HiddenStates:
    dense = functools.partial(Dense, bias=True, **self.types)
    norm = functools.partial(layer_norm, self.eps, **self.types)
    embed = x.shape[-1]

    h = norm(name="norm1")(x)
    project = lambda name: dense(embed, name=name)(h).reshape(
      *h.shape[:2], self.heads, -1
    )
    q, k, v = project("q"), project("k"), project("v")
    h = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    x = x + dense(embed, name="o")(h.reshape(x.shape))

    h = CLIP_ACTIVATIONS[self.activation](
      dense(self.mlp, name="fc1")(norm(name="norm2")(x))
    )
    return x + dense(embed, name="fc2")(h)


def run_blocks(
  blocks: EncoderBlock,
  x: HiddenStates,
  count: int,
  mask: Bool[Array, "batch time time"] | None = None,
) -> HiddenStates:
  """Applies a stack of `count` blocks, whose parameters are stacked on axis 0."""
  scan = nn.scan(
    lambda block, x: (block(x, mask), None),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=count,
  )
  return scan(blocks, x)[0]


def run_blocks_between(
  blocks: EncoderBlock, x: HiddenStates, start: int, stop: int
) -> HiddenStates:
  """Applies the blocks from `start` to before `stop`; the others do not run."""
  block, variables = blocks.clone(parent=None), blocks.variables

  def layer(x, i):
    at = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
    return block.apply(jax.tree.map(at, variables), x), None

  return jax.lax.scan(layer, x, jnp.arange(start, stop))[0]


class Tower(Layer, kw_only=True):
  """Settings that vision and text towers share."""

  embed: int  # Width of hidden states.
  mlp: int  # Width of the MLP.
  layers: int  # Number of layers.
  heads: int  # Attention heads.
  activation: str = "quick_gelu"  # A key of CLIP_ACTIVATIONS.
  eps: float = 1e-5  # Epsilon of layer norms.

  def block(self, name: str | None = None) -> EncoderBlock:
    """Returns the block whose parameters are stacked over layers."""
    return EncoderBlock(
      self.heads, self.mlp, self.activation, self.eps, name=name, **self.types
    )


class VisionTower(Tower, kw_only=True):
  """A vision tower that returns features of an image or of its patches."""

  image: int  # Side of the square image, in pixels.
  patch: int  # Side of a patch, in pixels.
  # Index of the features among the layers + 1 hidden states. Several are concatenated.
  select_layer: int | tuple[int, ...] = -2
  mean: tuple[float, ...] = MEAN  # Of training pixels: red, green and blue.
  std: tuple[float, ...] = STD  # Standard deviation of training pixels.
  # Adds a token before the patches, and a norm before the blocks. Without it, patches
  # have a bias.
  class_token: bool = True

  def setup(self):
    param = lambda name, *shape: self.param(
      name, nn.initializers.normal(0.02), shape, self.param_dtype
    )
    positions = self.patch_count
    self.patch_kernel = Dense(
      self.embed, bias=not self.class_token, **self.types, name="patch"
    )
    if self.class_token:
      self.class_embedding = param("class_embedding", self.embed)
      self.pre_norm = layer_norm(self.eps, **self.types, name="pre_norm")
      positions += 1
    self.position_embedding = param("position_embedding", positions, self.embed)
    self.blocks = self.block()
    self.post_norm = layer_norm(self.eps, **self.types, name="post_norm")

  @property
  def patch_count(self) -> int:
    """Number of patches of an image."""
    return (self.image // self.patch) ** 2

  @property
  def selected_layers(self) -> tuple[int, ...]:
    """Number of layers before each selected hidden state."""
    chosen = self.select_layer
    layers = chosen if isinstance(chosen, tuple) else (chosen,)
    return tuple(layer % (self.layers + 1) for layer in layers)

  @property
  def padding_color(self) -> tuple[int, ...]:
    """Red, green and blue of the padding of frames: near 0 after `normalize`."""
    return tuple(int(255 * mean) for mean in self.mean)

  @property
  def selected(self) -> int:
    """Number of layers that run before the last selected hidden state."""
    return max(self.selected_layers)

  @property
  def channels(self) -> int:
    """Width of the features of a patch."""
    return self.embed * len(self.selected_layers)

  @property
  def feature_shape(self) -> tuple[int, ...]:
    """Shape of the features of a frame."""
    return self.patch_count, self.channels

  def settings(self) -> dict[str, Any]:
    """Returns the settings that features depend on."""
    layers = self.selected_layers
    pixels = self.normalize(jnp.array([[[0] * 3, [255] * 3]], jnp.uint8))
    return {
      "kind": type(self).__module__,  # The family, such as CLIP or SigLIP.
      **dict(image=self.image, patch=self.patch, heads=self.heads),
      **dict(activation=self.activation, eps=self.eps),
      "layer": layers[0] if len(layers) == 1 else layers,
      "dtype": jnp.dtype(self.dtype).name,
      # Rounded, because the last bit of a division differs between accelerators.
      "pixels": np.round(pixels, 4).tolist(),
    }

  def measure(self, grid: tuple[int, int]) -> TowerShape:
    """Returns the sizes of the tower, whose grid is always the same."""
    del grid
    return TowerShape(
      (self.image, self.image, 3),
      "uint8",
      self.embed,
      self.mlp,
      self.heads,
      layers=self.selected,
      patches=self.patch_count,
      inputs=3 * self.patch**2,
      kernels=self.embed * (4 * self.embed + 2 * self.mlp),
      pairs=self.patch_count**2,
    )

  def example_inputs(self) -> tuple[Any, ...]:
    """Returns inputs by which the tower is initialized."""
    return (jnp.zeros((1, self.image, self.image, 3)),)

  def features(
    self,
    video: UInt8[Array, "batch frames height width 3"]
    | Float[Array, "batch frames height width 3"],
    grid: None = None,
  ) -> Float[Array, "batch frames patches channels"]:
    """Computes the features of frames, raw (uint8) or normalized."""
    if video.dtype == jnp.uint8:
      video = self.normalize(video)
    images = video.reshape(-1, *video.shape[2:])
    patches = self.patches(images)
    return patches.reshape(*video.shape[:2], *patches.shape[1:])

  def _cut(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch patches channels"]:
    return cut_patches(pixels, self.image, self.patch)

  def _embed(self, patches: Float[Array, "batch patches channels"]) -> HiddenStates:
    """Returns embeddings of the class token, if any, and of patches in raster order."""
    x = self.patch_kernel(patches)
    if not self.class_token:
      return x + self.position_embedding.astype(x.dtype)
    first = jnp.broadcast_to(self.class_embedding, (len(x), 1, self.embed))
    x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    return self.pre_norm(x + self.position_embedding.astype(x.dtype))

  def __call__(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch *patches embed"]:
    """Computes the last hidden state of normalized pixels, after the last norm.

    It is that of the class token or, without a class token, that of every patch.
    """
    x = run_blocks(self.blocks, self._embed(self._cut(pixels)), self.layers)
    return self.post_norm(x[:, 0] if self.class_token else x)

  def patches(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch patches channels"]:
    """Computes the selected hidden states of the patches; later layers do not run."""
    return self.select_states(self._cut(pixels))

  def select_states(
    self, patches: Float[Array, "batch patches channels"]
  ) -> Float[Array, "batch patches features"]:
    """Computes the hidden states of `patches` from the result of cut_patches."""
    x, done, states = self._embed(patches), 0, {}
    for layer in sorted(set(self.selected_layers)):
      states[layer] = x = run_blocks_between(self.blocks, x, done, layer)
      done = layer
    x = jnp.concatenate([states[layer] for layer in self.selected_layers], axis=-1)
    return x[:, 1:] if self.class_token else x

  def normalize(
    self, frames: UInt8[Array, "*batch height width 3"]
  ) -> Float[Array, "*batch height width 3"]:
    """Scales pixels from 0..255 to mean 0 and variance 1 of training, in float32."""
    mean, std = jnp.array(self.mean), jnp.array(self.std)
    return (frames.astype(jnp.float32) / 255 - mean) / std


Model = VisionTower
