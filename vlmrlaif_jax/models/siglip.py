"""SigLIP's vision tower (Zhai et al. 2023, 2303.15343): ViT without a class token."""

from typing import Any

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vlmrlaif_jax.models import clip
from vlmrlaif_jax.models.layers import HiddenStates

VARIANTS: dict[str, dict[str, Any]] = {
  # As in so400m_384, the image is no multiple of a patch and its margin is cut off.
  "tiny": dict(image=18, patch=4, embed=32, mlp=64, layers=3, heads=4),
  "base_224": dict(image=224, patch=16, embed=768, mlp=3072, layers=12, heads=12),
  "so400m_384": dict(image=384, patch=14, embed=1152, mlp=4304, layers=27, heads=16),
}

CONFIG = clip.CONFIG

SHARDING = ((r"patch/bias", P("tensor")), *clip.SHARDING)

# See clip.HF_VISION. The pooling head of checkpoints, "head.", is not loaded.
HF_VISION = {
  **{
    path: source
    for path, source in clip.HF_VISION.items()
    if not path.startswith(("class_embedding", "pre_norm"))
  },
  "patch/bias": ("embeddings.patch_embedding.bias", ""),
}


class Model(clip.VisionTower):
  """A vision tower that returns features of patches, without a class token."""

  activation: str = "gelu_pytorch_tanh"
  eps: float = 1e-6
  class_token: bool = False
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)

  def encode_patches(
    self, patches: Float[Array, "images patches channels"]
  ) -> HiddenStates:
    """Computes the last hidden states of images that are cut, after the last norm.

    Args:
      patches: normalized pixels by clip.cut_patches.
    """
    x = self.patch_kernel(patches)
    x = x + self.position_embedding.astype(x.dtype)
    return self.post_norm(clip.run_blocks(self.blocks, x, self.layers))
