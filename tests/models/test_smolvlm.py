import functools

import flax
import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from tests.helpers import smolvlm as tiny
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.huggingface import param_mapping
from vlmrlaif_jax.models import clip, lora, smolvlm, vlm

PATCH, GRID = 8, (4, 4)


def make_squares(count):
  shape = (count, tiny.SIDE, tiny.SIDE, 3)
  return np.random.default_rng(count).normal(size=shape).astype(np.float32)


def cut(squares):
  return clip.cut_patches(jax.numpy.asarray(squares), tiny.SIDE, PATCH)


@functools.cache
def encoder():
  _, model, _ = tiny.pair()
  apply = functools.partial(model.apply, method="encode")
  return jax.jit(apply, static_argnames="grid")


def their_features(squares):
  hf, _, _ = tiny.pair()
  pixels = torch.tensor(np.moveaxis(squares, -1, 1))[None]
  with torch.no_grad():
    return hf.model.get_image_features(pixels).pooler_output[0].numpy()


# Features.


def test_features_of_frames_equal_transformers():
  _, _, variables = tiny.pair()
  squares = make_squares(3)
  got = encoder()(variables, cut(squares), grid=GRID)
  want = their_features(squares)
  assert got.shape == (3, tiny.TOKENS, 32) and np.std(want) > 0.3
  np.testing.assert_allclose(got.reshape(want.shape), want, atol=2e-5)


def test_features_of_an_image_are_those_of_its_crops():
  _, _, variables = tiny.pair()
  squares = make_squares(14).reshape(2, 7, tiny.SIDE, tiny.SIDE, 3)
  patches = np.stack([cut(image).reshape(-1, 3 * PATCH**2) for image in squares])
  got = encoder()(variables, patches, grid=(8, 12))
  want = np.stack([their_features(image) for image in squares])
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_features_of_a_trained_merger_equal_those_of_the_tower():
  hf, model, variables = tiny.pair()
  other = smolvlm.make_model(hf.config.to_dict(), "float32", train_merger=True)
  merger = {"merger": variables["params"]["vision"]["merger"]}
  tower = {"tower": variables["params"]["vision"]["tower"]}
  squares = cut(make_squares(2))
  states = other.vision.apply({"params": tower}, squares, GRID)
  assert states.shape[2:] == other.vision.feature_shape == (4 * 24,)
  got = other.projector.apply({"params": merger}, states, method="connect")
  want = model.vision.apply({"params": variables["params"]["vision"]}, squares, GRID)
  np.testing.assert_allclose(got.merged, want, atol=1e-6)
  assert got.deepstack is None


@pytest.mark.parametrize("side", [4, 27, 32])  # Tiny, 2.2b, and the other sizes.
def test_position_ids_of_a_whole_square_count_its_patches(side):
  # transformers computes them from fractions of the side, in float32. At sides such as
  # 19 it gives two columns the same position.
  config = transformers.SmolVLMConfig(
    vision_config=dict(
      hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1
    )
  ).vision_config
  embeddings = SmolVLMVisionEmbeddings(config)
  count = torch.arange(side**2, dtype=torch.float32)
  with torch.no_grad():
    embeddings.position_embedding.weight.copy_(count[:, None])
    embeddings.patch_embedding.bias.zero_()
    whole = torch.ones((1, side, side), dtype=torch.bool)
    got = embeddings(torch.zeros(1, 3, side, side), whole)
  assert torch.equal(got[0, :, 0], count)


# Configs.


@pytest.mark.parametrize(
  "change, reason",
  [
    (lambda c: c["vision_config"].update(hidden_act="swish"), "hidden_act must be"),
    (lambda c: c.update(scale_factor=3), "scale_factor=3 must divide the 4 patches"),
    (
      lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"),
      "rope_type 'default', got 'yarn'",
    ),
  ],
)
def test_unsupported_values_are_refused_by_name(change, reason):
  config = tiny.their_config().to_dict()
  change(config)
  with pytest.raises(ValueError, match=reason):
    smolvlm.make_model(config, "float32")


# Published sizes.

PUBLISHED = {  # How many parameters the checkpoints on Hugging Face say they have.
  "256m": 256_484_928,
  "500m": 507_482_304,
  "2.2b": 2_246_784_880,
}


def published_config(size):
  tower, llm = smolvlm.VARIANTS[size], smolvlm.LLM_VARIANTS[size]
  return transformers.SmolVLMConfig(
    vision_config={name: tower[field] for field, name in smolvlm.CONFIG.items()
                   if field in tower},
    text_config=dict(
      model_type="llama", vocab_size=llm["vocab"], hidden_size=llm["embed"],
      intermediate_size=llm["mlp"], num_hidden_layers=llm["layers"],
      num_attention_heads=llm["heads"], num_key_value_heads=llm["kv_heads"],
      pad_token_id=2,
    ),
    scale_factor=tower["merge"],
  )  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_tensors_have_the_names_shapes_and_number_of_transformers(size):
  config = published_config(size)
  with torch.device("meta"):
    hf = transformers.SmolVLMForConditionalGeneration(config)
  want = {name: tuple(x.shape) for name, x in hf.state_dict().items()}
  shapes = vlm.get_param_shapes(smolvlm.make_model(config.to_dict(), "bfloat16"))
  assert param_mapping.get_hf_shapes(smolvlm.HF, shapes) == want
  assert lora.count_params(shapes) == PUBLISHED[size]


@pytest.mark.parametrize("size", smolvlm.VARIANTS)
def test_every_parameter_of_a_tower_has_a_name_and_a_sharding_rule(size):
  model = smolvlm.Model(**smolvlm.VARIANTS[size])
  init = lambda key: model.init(key, *model.example_inputs())
  shapes = jax.eval_shape(init, jax.random.key(0))["params"]
  names = flax.traverse_util.flatten_dict({"vision": shapes}, sep="/")
  assert set(names) == {name for name in smolvlm.HF if name.startswith("vision/")}
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules(shapes, smolvlm.SHARDING, mesh)
