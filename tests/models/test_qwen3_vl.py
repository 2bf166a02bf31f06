import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.huggingface import param_mapping
from vlmrlaif_jax.models import decoder, layers, lora, qwen3_vl

GRIDS = [(2, 2), (4, 6), (10, 4), (6, 14)]  # The table is 6 x 6: smaller and larger.


def their_config(model):
  config = layers.write_fields(qwen3_vl.CONFIG, model)
  return transformers.Qwen3VLConfig(vision_config=config).vision_config


def shapes_of(variant):
  model = qwen3_vl.Model(**qwen3_vl.VARIANTS[variant])
  pixels = jnp.zeros((1, 4, 6 * model.patch**2))
  init = functools.partial(model.init, grid=(2, 2))
  return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


@pytest.fixture(scope="module", params=["gelu_pytorch_tanh", "gelu"])
def both(request):
  """A random tower of transformers, and ours with its weights."""
  model = qwen3_vl.Model(**qwen3_vl.VARIANTS["tiny"], activation=request.param)
  torch.manual_seed(0)
  hf = Qwen3VLVisionModel(their_config(model)).eval()
  with torch.no_grad():
    for p in hf.parameters():
      p.add_(0.15 * torch.randn_like(p))
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  params = param_mapping.convert_from_hf(qwen3_vl.HF_VISION, tensors, shapes_of("tiny"))
  return hf, jax.jit(
    functools.partial(model.apply, {"params": params}), static_argnums=1
  )


def make_pixels(images, grid, seed=0):
  shape = (images, grid[0] * grid[1], 6 * 4**2)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run_theirs(hf, pixels, grids):
  """Returns (merged, deepstack) of flat patches."""
  with torch.no_grad():
    out = hf(torch.tensor(pixels), grid_thw=torch.tensor(grids))
  return out.pooler_output.numpy(), torch.stack(out.deepstack_features).numpy()


@pytest.mark.parametrize("grid", GRIDS)
def test_features_of_a_clip_equal_transformers(both, grid):
  hf, ours = both
  pixels = make_pixels(3, grid)
  merged, deepstack = run_theirs(hf, pixels.reshape(-1, 96), [(3, *grid)])
  got = ours(pixels, grid)
  assert np.std(merged) > 0.3 and np.std(deepstack) > 0.3
  np.testing.assert_allclose(got.merged.reshape(merged.shape), merged, atol=2e-5)
  np.testing.assert_allclose(
    got.deepstack.reshape(deepstack.shape), deepstack, atol=2e-5
  )


def test_images_and_clips_of_one_grid_share_a_batch(both):
  hf, ours = both
  pixels = make_pixels(4, (4, 6))
  grids = [(1, 4, 6), (2, 4, 6), (1, 4, 6)]
  merged, _ = run_theirs(hf, pixels.reshape(-1, 96), grids)
  got = ours(pixels, (4, 6)).merged
  np.testing.assert_allclose(got.reshape(merged.shape), merged, atol=2e-5)


def test_temporal_patches_do_not_see_each_other(both):
  _, ours = both
  pixels = make_pixels(2, (4, 4))
  other = np.concatenate([pixels[:1], make_pixels(1, (4, 4), seed=1)])
  got, want = ours(other, (4, 4)), ours(pixels, (4, 4))
  np.testing.assert_allclose(got.merged[0], want.merged[0], atol=1e-6)
  assert np.abs(got.merged[1] - want.merged[1]).max() > 0.1


def test_one_grid_is_compiled_once(both):
  _, ours = both
  for seed in range(3):
    ours(make_pixels(5, (2, 4), seed), (2, 4))
  before = ours._cache_size()
  ours(make_pixels(5, (2, 4), seed=9), (2, 4))
  assert ours._cache_size() == before


def test_features_before_the_merger_can_be_merged_later():
  model = qwen3_vl.Model(**qwen3_vl.VARIANTS["tiny"])
  pixels = jnp.asarray(make_pixels(2, (4, 4)))

  def in_steps_and_at_once(key):
    want, variables = model.init_with_output(key, pixels, (4, 4))
    states = model.apply(variables, pixels, (4, 4), method="encode")
    return states, model.apply(variables, states, method="merge_patches"), want

  states, got, want = jax.jit(in_steps_and_at_once)(jax.random.key(0))
  assert states.shape == (3, 2, 16, 32)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_last_layer_can_be_tapped():
  model = qwen3_vl.Model(**{**qwen3_vl.VARIANTS["tiny"], "taps": (3,)})
  pixels = jnp.asarray(make_pixels(1, (2, 2)))
  encode = functools.partial(model.init_with_output, method="encode")
  states, _ = jax.jit(encode, static_argnums=2)(jax.random.key(0), pixels, (2, 2))
  np.testing.assert_array_equal(states[0], states[1])


def test_bfloat16_is_close_to_float32(both):
  hf, ours = both
  params = param_mapping.convert_from_hf(
    qwen3_vl.HF_VISION,
    {name: tensor.numpy() for name, tensor in hf.state_dict().items()},
    shapes_of("tiny"),
  )
  model = qwen3_vl.Model(
    **qwen3_vl.VARIANTS["tiny"],
    dtype="bfloat16",
    activation=hf.config.hidden_act,
  )
  pixels = make_pixels(2, (4, 4))
  got = jax.jit(model.apply, static_argnums=2)({"params": params}, pixels, (4, 4))
  want = ours(pixels, (4, 4))
  assert got.merged.dtype == got.deepstack.dtype == "bfloat16"
  error = np.abs(np.asarray(got.merged, np.float32) - want.merged).mean()
  assert error < 0.02 * np.abs(want.merged).mean() + 0.02


def test_to_hugging_face_is_the_inverse(both):
  hf, _ = both
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  params = param_mapping.convert_from_hf(qwen3_vl.HF_VISION, tensors, shapes_of("tiny"))
  written = dict(param_mapping.convert_to_hf(qwen3_vl.HF_VISION, params))
  assert written.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(written[name], x)


def test_features_on_a_mesh_equal_those_on_one_device(both):
  hf, ours = both
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  mesh, shapes = sharding.make_mesh(fsdp=2, tensor=2), shapes_of("tiny")
  places = sharding.shard_by_rules(shapes, qwen3_vl.SHARDING, mesh)
  table = qwen3_vl.HF_VISION
  params = param_mapping.convert_from_hf(table, tensors, shapes, places)
  activation = hf.config.hidden_act
  model = qwen3_vl.Model(**qwen3_vl.VARIANTS["tiny"], activation=activation)
  pixels = make_pixels(4, (4, 6))
  rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
  with jax.set_mesh(mesh):
    apply = jax.jit(model.apply, static_argnums=2)
    got = apply({"params": params}, jax.device_put(pixels, rows), (4, 6))
  np.testing.assert_allclose(got.merged, ours(pixels, (4, 6)).merged, atol=2e-5)


# Published sizes.


@pytest.mark.parametrize("variant", qwen3_vl.VARIANTS)
def test_tensors_of_a_tower_have_the_names_and_shapes_of_transformers(variant):
  model = qwen3_vl.Model(**qwen3_vl.VARIANTS[variant])
  with torch.device("meta"):
    hf = Qwen3VLVisionModel(their_config(model))
  want = {name: tuple(x.shape) for name, x in hf.state_dict().items()}
  assert param_mapping.get_hf_shapes(qwen3_vl.HF_VISION, shapes_of(variant)) == want


@pytest.mark.parametrize("variant", qwen3_vl.VARIANTS)
def test_every_parameter_has_a_name_and_a_sharding_rule(variant):
  shapes = shapes_of(variant)
  flat = flax.traverse_util.flatten_dict(shapes, sep="/")
  assert set(flat) == set(qwen3_vl.HF_VISION)
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules(shapes, qwen3_vl.SHARDING, mesh)


PUBLISHED = {  # How many parameters the checkpoints on Hugging Face say they have.
  "2b": 2_127_532_032,
  "4b": 4_437_815_808,
  "8b": 8_767_123_696,
  "32b": 33_357_390_064,
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_tower_and_language_model_have_as_many_parameters_as_published(variant):
  llm = decoder.Decoder(**qwen3_vl.LLM_VARIANTS[variant], qk_norm=True)
  ones = jnp.ones((1, 4), int)
  hidden = lambda m, t: m.logits(m(m.embed_tokens(t), t[..., None], t > 0))
  init = functools.partial(llm.init, method=hidden)
  shapes = jax.eval_shape(init, jax.random.key(0), ones)["params"]
  total = lora.count_params(shapes) + lora.count_params(shapes_of(variant))
  assert total == PUBLISHED[variant]
