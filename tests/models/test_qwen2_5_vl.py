import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
  Qwen2_5_VisionTransformerPretrainedModel as TheirTower,
)

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.huggingface import param_mapping
from vlmrlaif_jax.models import decoder, layers, lora, qwen2_5_vl

# A window of "tiny" has 3 x 3 cells of 2 x 2 patches: a smaller window, whole windows,
# and windows that are cut off at the right, at the bottom and at both.
GRIDS = [(2, 2), (6, 12), (6, 10), (8, 6), (10, 14)]


def their_config(model):
  config = layers.write_fields(qwen2_5_vl.CONFIG, model)
  return transformers.Qwen2_5_VLConfig(vision_config=config).vision_config


def shapes_of(variant):
  model = qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS[variant])
  pixels = jnp.zeros((1, 4, 6 * model.patch**2))
  init = functools.partial(model.init, grid=(2, 2))
  return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


@pytest.fixture(scope="module")
def both():
  """A random tower of transformers, and ours with its weights."""
  model = qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS["tiny"])
  torch.manual_seed(0)
  hf = TheirTower(their_config(model)).eval()
  with torch.no_grad():
    for p in hf.parameters():
      p.add_(0.15 * torch.randn_like(p))
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  table, shapes = qwen2_5_vl.HF_VISION, shapes_of("tiny")
  params = param_mapping.convert_from_hf(table, tensors, shapes)
  return hf, jax.jit(
    functools.partial(model.apply, {"params": params}), static_argnums=1
  )


def make_pixels(images, grid):
  shape = (images, grid[0] * grid[1], 6 * 4**2)
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS)
def test_features_of_a_clip_equal_transformers(both, grid):
  hf, ours = both
  pixels = make_pixels(3, grid)
  with torch.no_grad():
    out = hf(torch.tensor(pixels.reshape(-1, 96)), torch.tensor([(3, *grid)]))
  want = out.pooler_output.numpy()
  got = ours(pixels, grid)
  assert np.std(want) > 0.3
  np.testing.assert_allclose(got.merged.reshape(want.shape), want, atol=2e-5)
  assert got.deepstack is None


def test_windows_do_not_see_each_other_without_full_layers():
  settings = {**qwen2_5_vl.VARIANTS["tiny"], "full_layers": ()}
  model = qwen2_5_vl.Model(**settings)
  pixels = jnp.asarray(make_pixels(1, (6, 12)))

  def first_and_changed(key):
    first, variables = model.init_with_output(key, pixels, (6, 12))
    # The first cell is in the first window, of columns 0 to 5.
    changed = model.apply(variables, pixels.at[0, :4].add(1), (6, 12))
    return first.merged, changed.merged

  first, changed = jax.jit(first_and_changed)(jax.random.key(0))
  differs = np.abs(first - changed).max(-1).reshape(3, 6) > 1e-6
  assert differs[:, :3].all() and not differs[:, 3:].any()


def test_to_hugging_face_is_the_inverse(both):
  hf, _ = both
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  table, shapes = qwen2_5_vl.HF_VISION, shapes_of("tiny")
  params = param_mapping.convert_from_hf(table, tensors, shapes)
  written = dict(param_mapping.convert_to_hf(table, params))
  assert written.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(written[name], x)


def test_features_on_a_mesh_equal_those_on_one_device(both):
  hf, ours = both
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  mesh, shapes = sharding.make_mesh(fsdp=2, tensor=2), shapes_of("tiny")
  places = sharding.shard_by_rules(shapes, qwen2_5_vl.SHARDING, mesh)
  table = qwen2_5_vl.HF_VISION
  params = param_mapping.convert_from_hf(table, tensors, shapes, places)
  model = qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS["tiny"])
  pixels = make_pixels(4, (4, 6))
  rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
  with jax.set_mesh(mesh):
    apply = jax.jit(model.apply, static_argnums=2)
    got = apply({"params": params}, jax.device_put(pixels, rows), (4, 6))
  np.testing.assert_allclose(got.merged, ours(pixels, (4, 6)).merged, atol=2e-5)


# Published sizes.


@pytest.mark.parametrize("variant", qwen2_5_vl.VARIANTS)
def test_tensors_of_a_tower_have_the_names_and_shapes_of_transformers(variant):
  model = qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS[variant])
  with torch.device("meta"):
    hf = TheirTower(their_config(model))
  want = {name: tuple(x.shape) for name, x in hf.state_dict().items()}
  assert param_mapping.get_hf_shapes(qwen2_5_vl.HF_VISION, shapes_of(variant)) == want


@pytest.mark.parametrize("variant", qwen2_5_vl.VARIANTS)
def test_every_parameter_has_a_name_and_a_sharding_rule(variant):
  shapes = shapes_of(variant)
  flat = flax.traverse_util.flatten_dict(shapes, sep="/")
  assert set(flat) == set(qwen2_5_vl.HF_VISION)
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules(shapes, qwen2_5_vl.SHARDING, mesh)


PUBLISHED = {  # How many parameters the checkpoints on Hugging Face say they have.
  "3b": 3_754_622_976,
  "7b": 8_292_166_656,
  "32b": 33_452_718_336,
  "72b": 73_410_777_344,
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_tower_and_language_model_have_as_many_parameters_as_published(variant):
  llm = decoder.Decoder(**qwen2_5_vl.LLM_VARIANTS[variant], qkv_bias=True)
  ones = jnp.ones((1, 4), int)
  hidden = lambda m, t: m.logits(m(m.embed_tokens(t), t[..., None], t > 0))
  init = functools.partial(llm.init, method=hidden)
  shapes = jax.eval_shape(init, jax.random.key(0), ones)["params"]
  total = lora.count_params(shapes) + lora.count_params(shapes_of(variant))
  assert total == PUBLISHED[variant]
