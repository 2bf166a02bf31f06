"""CLIP (Radford et al. 2021, 2103.00020): a vision tower and a text tower."""

import functools
from collections.abc import Callable
from typing import TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from vlmrlaif_jax.models.layers import Dense, DTypes
from vlmrlaif_jax.models.ops.attention import attend


class Shape(TypedDict):
  """The sizes of a vision tower."""

  image: int  # Side of the square image, in pixels.
  patch: int
  embed: int
  mlp: int
  layers: int
  heads: int


VARIANTS: dict[str, Shape] = {
  "tiny": dict(image=16, patch=4, embed=32, mlp=64, layers=3, heads=4),
  "b32": dict(image=224, patch=32, embed=768, mlp=3072, layers=12, heads=12),
  "l14": dict(image=224, patch=14, embed=1024, mlp=4096, layers=24, heads=16),
  "l14_336": dict(image=336, patch=14, embed=1024, mlp=4096, layers=24, heads=16),
}

# What the fields of Model are called in a Hugging Face config.json.
CONFIG = {
  "image": "image_size",
  "patch": "patch_size",
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "activation": "hidden_act",
  "eps": "layer_norm_eps",
}

# How each parameter is split over the mesh: the first rule that matches counts.
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

_BLOCKS = {
  f"blocks/{ours}/{leaf}": (f"encoder.layers.{{}}.{theirs}.{name}", op)
  for ours, theirs, matrix in (
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

# Where each parameter comes from in a Hugging Face checkpoint, see llama.HF; "conv"
# lays a convolution's kernel out as the matrix that patches are multiplied with.
HF_VISION = {
  "class_embedding": ("embeddings.class_embedding", ""),
  "patch/kernel": ("embeddings.patch_embedding.weight", "conv"),
  "position_embedding": ("embeddings.position_embedding.weight", ""),
  "pre_norm/scale": ("pre_layrnorm.weight", ""),
  "pre_norm/bias": ("pre_layrnorm.bias", ""),
  **_BLOCKS,
  "post_norm/scale": ("post_layernorm.weight", ""),
  "post_norm/bias": ("post_layernorm.bias", ""),
}
HF_TEXT = {
  "token_embedding/embedding": ("embeddings.token_embedding.weight", ""),
  "position_embedding": ("embeddings.position_embedding.weight", ""),
  **_BLOCKS,
  "final_norm/scale": ("final_layer_norm.weight", ""),
  "final_norm/bias": ("final_layer_norm.bias", ""),
}
HF = {
  **{f"vision/{k}": (f"vision_model.{n}", op) for k, (n, op) in HF_VISION.items()},
  **{f"text/{k}": (f"text_model.{n}", op) for k, (n, op) in HF_TEXT.items()},
  "visual_projection/kernel": ("visual_projection.weight", "T"),
  "text_projection/kernel": ("text_projection.weight", "T"),
  "logit_scale": ("logit_scale", ""),
}

MEAN = (0.48145466, 0.4578275, 0.40821073)  # Of the pixels CLIP was trained on.
STD = (0.26862954, 0.26130258, 0.27577711)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_pytorch_tanh": nn.gelu,
}


def normalise_pixels(
  frames: UInt8[Array, "*batch height width 3"],
) -> Float[Array, "*batch height width 3"]:
  """Pixels 0..255 in the range that CLIP was trained on, in float32."""
  return (frames.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


def cut_patches(
  pixels: Float[Array, "batch height width 3"], image: int, patch: int
) -> Float[Array, "batch patches channels"]:
  """The squares of patch x patch pixels that images are made of, in raster order.

  Args:
    image: the side that images are to have; pixels beyond the last whole patch at
      the right and the bottom are cut off.
  """
  batch, height, width, _ = pixels.shape
  if (height, width) != (image, image):
    raise ValueError(
      f"images must be {image} x {image} pixels, not {height} x {width}: resize them"
      " when loading"
    )
  side = image // patch
  pixels = pixels[:, : side * patch, : side * patch]
  patches = pixels.reshape(batch, side, patch, side, patch, 3)
  return patches.swapaxes(2, 3).reshape(batch, side * side, -1)


def layer_norm(
  eps: float, dtype: DTypeLike, param_dtype: DTypeLike, name: str
) -> Callable[[Float[Array, "*batch embed"]], Float[Array, "*batch embed"]]:
  """A layer norm that computes in float32 and returns dtype."""
  norm = nn.LayerNorm(
    eps,
    dtype=jnp.float32,
    param_dtype=param_dtype,
    use_fast_variance=False,
    name=name,
  )
  return lambda x: norm(x).astype(dtype)


class Block(nn.Module):
  """Attention and an MLP, each normalised before and around a residual."""

  heads: int
  mlp: int
  activation: str
  eps: float
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "batch time embed"],
    mask: Bool[Array, "batch time time"] | None = None,
  ) -> Float[Array, "batch time embed"]:
    types = DTypes(dtype=self.dtype, param_dtype=self.param_dtype)
    dense = functools.partial(Dense, bias=True, **types)
    norm = functools.partial(layer_norm, self.eps, **types)
    embed = x.shape[-1]

    h = norm(name="norm1")(x)
    project = lambda name: dense(embed, name=name)(h).reshape(
      *h.shape[:2], self.heads, -1
    )
    q, k, v = project("q"), project("k"), project("v")
    h = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    x = x + dense(embed, name="o")(h.reshape(x.shape))

    h = ACTIVATIONS[self.activation](dense(self.mlp, name="fc1")(norm(name="norm2")(x)))
    return x + dense(embed, name="fc2")(h)


def run_blocks(
  blocks: Block,
  x: Float[Array, "batch time embed"],
  count: int,
  mask: Bool[Array, "batch time time"] | None = None,
) -> Float[Array, "batch time embed"]:
  """What a stack of `count` blocks, with parameters on axis 0, makes of x."""
  scan = nn.scan(
    lambda block, x: (block(x, mask), None),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=count,
  )
  return scan(blocks, x)[0]


def run_first_blocks(
  blocks: Block, x: Float[Array, "batch time embed"], count: int
) -> Float[Array, "batch time embed"]:
  """What the first `count` of a stack of blocks make of x; the others do not run."""
  block, variables = blocks.clone(parent=None), blocks.variables

  def layer(x, i):
    at = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
    return block.apply(jax.tree.map(at, variables), x), None

  return jax.lax.scan(layer, x, jnp.arange(count))[0]


class VisionTower(nn.Module):
  """Images in, features of their patches out."""

  image: int  # Side of the square image, in pixels.
  patch: int
  embed: int
  mlp: int
  layers: int
  heads: int
  activation: str = "quick_gelu"
  eps: float = 1e-5
  select_layer: int = -2  # Which of the layers + 1 hidden states patches come from.
  # In front of the patches, with a norm of its own before the blocks; a tower without
  # it adds a bias to each patch.
  class_token: bool = True
  dtype: DTypeLike = "float32"
  param_dtype: DTypeLike = "float32"

  def setup(self):
    types = DTypes(dtype=self.dtype, param_dtype=self.param_dtype)
    param = lambda name, *shape: self.param(
      name, nn.initializers.normal(0.02), shape, self.param_dtype
    )
    positions = self.patch_count
    self.patch_kernel = Dense(
      self.embed, bias=not self.class_token, **types, name="patch"
    )
    if self.class_token:
      self.class_embedding = param("class_embedding", self.embed)
      self.pre_norm = layer_norm(self.eps, **types, name="pre_norm")
      positions += 1
    self.position_embedding = param("position_embedding", positions, self.embed)
    self.blocks = Block(self.heads, self.mlp, self.activation, self.eps, **types)
    self.post_norm = layer_norm(self.eps, **types, name="post_norm")

  @property
  def patch_count(self) -> int:
    """Patches of an image."""
    return (self.image // self.patch) ** 2

  @property
  def selected(self) -> int:
    """How many layers stand before the selected hidden state."""
    return self.select_layer % (self.layers + 1)

  def _embed(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch time embed"]:
    """The class token, if any, and the patches, in raster order, with positions."""
    x = self.patch_kernel(cut_patches(pixels, self.image, self.patch))
    if not self.class_token:
      return x + self.position_embedding.astype(x.dtype)
    first = jnp.broadcast_to(self.class_embedding, (len(x), 1, self.embed))
    x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    return self.pre_norm(x + self.position_embedding.astype(x.dtype))

  def __call__(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch *patches embed"]:
    """The last hidden state of normalised pixels, after the last norm.

    That of the class token or, in a tower without one, of every patch.
    """
    x = run_blocks(self.blocks, self._embed(pixels), self.layers)
    return self.post_norm(x[:, 0] if self.class_token else x)

  def patches(
    self, pixels: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch patches embed"]:
    """The selected hidden state of the patches; runs no layer beyond it."""
    x = run_first_blocks(self.blocks, self._embed(pixels), self.selected)
    return x[:, 1:] if self.class_token else x

  def normalise(
    self, frames: UInt8[Array, "*batch height width 3"]
  ) -> Float[Array, "*batch height width 3"]:
    """What this tower makes of pixels 0..255 before it looks at them."""
    return normalise_pixels(frames)


Model = VisionTower


class TextTower(nn.Module):
  """A caption in, one vector out: the state of the token that ends it."""

  vocab: int
  context: int  # Longest caption, in tokens.
  embed: int
  mlp: int
  layers: int
  heads: int
  activation: str = "quick_gelu"
  eps: float = 1e-5
  dtype: DTypeLike = "float32"
  param_dtype: DTypeLike = "float32"

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
  ) -> Float[Array, "batch embed"]:
    """The end token is the one of the highest id, as in CLIP's own vocabulary."""
    types = DTypes(dtype=self.dtype, param_dtype=self.param_dtype)
    init = nn.initializers.normal(0.02)
    time = tokens.shape[1]
    if time > self.context:
      raise ValueError(f"captions must have at most {self.context} tokens, not {time}")
    positions = self.param(
      "position_embedding", init, (self.context, self.embed), self.param_dtype
    )
    x = nn.Embed(
      self.vocab, self.embed, embedding_init=init, name="token_embedding", **types
    )(tokens)
    x = x + positions[:time].astype(x.dtype)
    attention = jnp.tri(time, dtype=bool) & mask[:, None, :]
    blocks = Block(
      self.heads, self.mlp, self.activation, self.eps, name="blocks", **types
    )
    x = run_blocks(blocks, x, self.layers, attention)
    end = jnp.argmax(tokens, axis=1)
    last = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return layer_norm(self.eps, name="final_norm", **types)(last)


class CLIP(nn.Module):
  """Both towers, and their projections into the space they share."""

  vision: VisionTower
  text: TextTower
  features: int  # Width of the shared space.

  def setup(self):
    project = functools.partial(
      Dense,
      self.features,
      dtype=self.vision.dtype,
      param_dtype=self.vision.param_dtype,
    )
    self.visual_projection, self.text_projection = project(), project()
    # 1 / 0.07, the temperature that CLIP starts from.
    init = nn.initializers.constant(2.6592)
    self.logit_scale = self.param("logit_scale", init, (), jnp.float32)

  def image_features(
    self,
    pixels: Float[Array, "images height width 3"]
    | UInt8[Array, "images height width 3"],
  ) -> Float[Array, "images features"]:
    """Of pixels, raw or normalised; not of unit length."""
    if pixels.dtype == jnp.uint8:
      pixels = normalise_pixels(pixels)
    return self.visual_projection(self.vision(pixels))

  def text_features(
    self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
  ) -> Float[Array, "batch features"]:
    """Not of unit length."""
    return self.text_projection(self.text(tokens, mask))

  def __call__(
    self,
    pixels: Float[Array, "images height width 3"]
    | UInt8[Array, "images height width 3"],
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
  ) -> Float[Array, "images batch"]:
    """Scaled cosine of every image with every text, in float32."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    images = unit(self.image_features(pixels).astype(jnp.float32))
    texts = unit(self.text_features(tokens, mask).astype(jnp.float32))
    return jnp.exp(self.logit_scale) * images @ texts.T
