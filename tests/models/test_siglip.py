import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlmrlaif_jax.huggingface.convert import convert_from_hf
from vlmrlaif_jax.models import layers, siglip

TINY = siglip.VARIANTS["tiny"]
PIXELS = np.random.default_rng(0).normal(size=(2, 18, 18, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
  return jax.jit(siglip.Model(**TINY).init)(jax.random.key(0), PIXELS)


def test_the_last_state_equals_transformers():
  model = siglip.Model(**TINY)
  config = layers.write_fields(siglip.CONFIG, model)
  torch.manual_seed(0)
  hf = transformers.SiglipVisionModel(
    transformers.SiglipVisionConfig(**config, vision_use_head=False)
  ).eval()
  with torch.no_grad():
    for p in hf.parameters():
      p.add_(0.15 * torch.randn_like(p))
    want = hf(torch.tensor(np.moveaxis(PIXELS, -1, 1))).last_hidden_state.numpy()
  shapes = jax.eval_shape(model.init, jax.random.key(0), PIXELS)["params"]
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  params = convert_from_hf(siglip.HF_VISION, tensors, shapes)
  got = jax.jit(model.apply)({"params": params}, PIXELS)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_pixels_beyond_the_last_whole_patch_are_cut_off(variables):
  rim = PIXELS.copy()
  rim[:, 16:], rim[:, :, 16:] = 9, 9
  apply = jax.jit(siglip.Model(**TINY).apply)
  got, want = (apply(variables, x) for x in (rim, PIXELS))
  np.testing.assert_array_equal(got, want)


def test_normalise_equals_the_image_processor():
  frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
  processor = transformers.SiglipImageProcessorPil(do_resize=False)
  want = processor(list(frames), return_tensors="np")["pixel_values"]
  got = siglip.Model(**TINY).normalize(jnp.asarray(frames))
  np.testing.assert_allclose(np.moveaxis(got, -1, 1), want, atol=1e-6)
