import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tools.pretraining import convert_clip
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.huggingface.convert import convert_from_hf
from vlmrlaif_jax.models import clip, clip_text

# Text towers of the published models, and a small one.
TEXT_VARIANTS = {
  "tiny": dict(vocab=64, context=16, embed=32, mlp=64, layers=2, heads=4),
  "b32": dict(vocab=49_408, context=77, embed=512, mlp=2048, layers=12, heads=8),
  "l14": dict(vocab=49_408, context=77, embed=768, mlp=3072, layers=12, heads=12),
  "l14_336": dict(vocab=49_408, context=77, embed=768, mlp=3072, layers=12, heads=12),
}
VISION, TEXT = clip.VARIANTS["tiny"], TEXT_VARIANTS["tiny"]
PIXELS = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TOKENS = np.array([[1, 5, 9, 63, 0, 0], [1, 7, 7, 2, 8, 63]])  # 63 ends a caption.
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)


def build(activation):
  return convert_clip.CLIP(
    clip.VisionTower(**VISION, activation=activation),
    clip_text.TextTower(**TEXT, activation=activation),
    features=24,
  )


def shapes_of(model):
  size = model.vision.image
  pixels, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 4), int)
  return jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def both(request):
  """A random CLIPModel, and ours with its weights: a function of method and inputs."""
  side = lambda shape: dict(
    hidden_size=shape["embed"],
    intermediate_size=shape["mlp"],
    num_hidden_layers=shape["layers"],
    num_attention_heads=shape["heads"],
    hidden_act=request.param,
  )
  torch.manual_seed(0)
  config = transformers.CLIPConfig(
    vision_config=dict(
      **side(VISION), image_size=VISION["image"], patch_size=VISION["patch"]
    ),
    text_config=dict(
      **side(TEXT),
      vocab_size=TEXT["vocab"],
      max_position_embeddings=TEXT["context"],
      bos_token_id=1,
      eos_token_id=63,
    ),
    projection_dim=24,
  )
  hf = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for p in hf.parameters():
      p.add_(0.2 * torch.randn_like(p))
  model = build(request.param)
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  params = convert_from_hf(convert_clip.HF, tensors, shapes_of(model)["params"])

  def ours(method, *inputs):
    apply = jax.jit(functools.partial(model.apply, method=method))
    return apply({"params": params}, *inputs)

  return hf, ours


def run(module, *args, **kwargs):
  with torch.no_grad():
    return module(*map(torch.tensor, args), **kwargs)


def nchw(pixels):
  return np.moveaxis(pixels, -1, 1)


def test_patches_equal_the_last_hidden_state_but_one_of_transformers(both):
  hf, ours = both
  want = run(hf.vision_model, nchw(PIXELS), output_hidden_states=True).hidden_states[-2]
  got = ours(lambda m, x: m.vision.patches(x), PIXELS)
  np.testing.assert_allclose(got, want[:, 1:], atol=2e-5)


def test_pooled_features_equal_transformers(both):
  hf, ours = both
  want = run(hf.vision_model, nchw(PIXELS)).pooler_output
  got = ours(lambda m, x: m.vision(x), PIXELS)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_image_features_equal_transformers(both):
  hf, ours = both
  want = run(hf.get_image_features, nchw(PIXELS)).pooler_output
  np.testing.assert_allclose(ours("image_features", PIXELS), want, atol=2e-5)


def test_text_features_equal_transformers(both):
  hf, ours = both
  want = run(hf.get_text_features, TOKENS, MASK.astype(int)).pooler_output
  np.testing.assert_allclose(ours("text_features", TOKENS, MASK), want, atol=2e-5)


def test_similarity_equals_transformers(both):
  hf, ours = both
  want = run(hf, TOKENS, nchw(PIXELS), MASK.astype(int)).logits_per_image
  np.testing.assert_allclose(ours("__call__", PIXELS, TOKENS, MASK), want, atol=2e-5)


def test_images_of_another_size_are_refused():
  with pytest.raises(ValueError, match="must be 16 x 16 pixels, not 8 x 16"):
    clip.VisionTower(**VISION).init(jax.random.key(0), jnp.zeros((1, 8, 16, 3)))


def test_captions_longer_than_the_context_are_refused():
  tokens = jnp.zeros((1, 17), int)
  with pytest.raises(ValueError, match="at most 16 tokens, not 17"):
    clip_text.TextTower(**TEXT).init(jax.random.key(0), tokens, tokens == 0)


def test_normalise_equals_the_image_processor():
  frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
  processor = transformers.CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
  want = processor(list(frames), return_tensors="np")["pixel_values"]
  got = clip.VisionTower(**VISION).normalize(jnp.asarray(frames))
  np.testing.assert_allclose(nchw(got), want, atol=1e-6)


@pytest.mark.parametrize("variant", clip.VARIANTS)
def test_every_parameter_has_a_sharding_rule_and_a_name(variant):
  model = convert_clip.CLIP(
    clip.VisionTower(**clip.VARIANTS[variant]),
    clip_text.TextTower(**TEXT_VARIANTS[variant]),
    features=32,
  )
  shapes = shapes_of(model)["params"]
  sharding.shard_by_rules(shapes, clip.SHARDING, sharding.make_mesh(fsdp=2, tensor=2))
  assert set(flax.traverse_util.flatten_dict(shapes, sep="/")) == set(convert_clip.HF)
