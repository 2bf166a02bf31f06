import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.helpers import onevision
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.data.processors.interface import Grid, Visual, mark_several
from vlmrlaif_jax.huggingface import families, param_mapping
from vlmrlaif_jax.models import layers, llava_onevision, lora, projector, vlm
from vlmrlaif_jax.models.decoders import qwen2

FRAME, CROP = (onevision.POOLED,) * 2, (onevision.SIDE,) * 2
SMALL = onevision.PROCESSOR


@pytest.fixture(scope="module")
def encode():
  """A function from pixels and a grid to features, of ours."""
  _, model, variables = onevision.pair()
  return jax.jit(
    functools.partial(model.apply, variables, method="encode"), static_argnums=1
  )


@pytest.fixture(scope="module")
def apart():
  """Features before the merger, and the function that merges them."""
  model, variables = onevision.build(merged=False), onevision.pair()[2]
  vision = dict(variables["params"]["vision"])
  projector = {"merger": vision.pop("merger")}
  params = {**variables["params"], "vision": vision, "projector": projector}
  assert_same = lambda x, shape: x.shape == shape.shape
  assert jax.tree.all(jax.tree.map(assert_same, params, vlm.get_param_shapes(model)))
  encode = functools.partial(model.apply, {"params": params}, method="encode")
  connect = lambda features: model.apply(
    {"params": params}, features, method=lambda m, x: m.projector.connect(x).merged
  )
  return jax.jit(encode, static_argnums=1), jax.jit(connect)


# Videos.


def their_video(hf, frames):
  with torch.no_grad():
    return hf.model.get_video_features(frames[None]).pooler_output[0].numpy()


@pytest.mark.parametrize("count", [2, 5])
def test_features_of_a_video_equal_transformers(encode, count):
  hf, *_ = onevision.pair()
  frames, pixels = onevision.make_squares(count)
  want = their_video(hf, frames)
  assert len(want) == count * 9 + 1 and np.std(want) > 0.3
  features = np.asarray(encode(pixels, FRAME))
  got = SMALL.arrange(features, Visual(Grid(count, *FRAME), (0.0,) * count))
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_tower_of_published_checkpoints_pools_to_14_rows():
  tower = llava_onevision.Model(**llava_onevision.VARIANTS["0.5b"])
  assert (tower.side, tower.pooled_side) == (27, 14)
  shape = jax.eval_shape(lambda: tower.init_with_output(
    jax.random.key(0), *tower.example_inputs()))[0]  # fmt: skip
  assert shape.shape == (1, 197, 896)


@pytest.mark.parametrize("pool", ["bilinear", "average"])
@pytest.mark.parametrize("size", [4, 5, 27])
def test_pooling_equals_torch(pool, size):
  x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
  channels_first = torch.tensor(np.moveaxis(x, -1, 1))
  if pool == "average":
    want = torch.nn.functional.avg_pool2d(channels_first, 2)
  else:
    half = -(-size // 2)
    want = torch.nn.functional.interpolate(
      channels_first, size=(half, half), mode="bilinear"
    )
  got = llava_onevision.pool_patches(
    jnp.asarray(x), *llava_onevision.POOLINGS[pool](size)
  )
  np.testing.assert_allclose(np.moveaxis(got, -1, 1), want, atol=5e-6)


@pytest.mark.parametrize("newline", llava_onevision.NEWLINES)
def test_newlines_are_where_the_layout_has_them(encode, newline):
  """LLaVA-Video ends each row of a frame with the newline."""
  _, model, variables = onevision.pair()
  _, pixels = onevision.make_squares(3)
  tower = model.vision.clone(newline=newline, parent=None)
  end = variables["params"]["vision"]["merger"]["newline"]
  frames = np.asarray(encode(pixels, FRAME))[:, :-1].reshape(3, 3, 3, -1)
  want = []
  for frame in frames:
    for row in frame:
      want += [*row, end] if newline == "grid" else [*row]
    want += [end] if newline == "frame" else []
  want += [end] if newline == "one_token" else []
  params = {"params": variables["params"]["vision"]}
  got = jax.jit(tower.apply, static_argnums=2)(params, pixels, FRAME)
  processor = onevision.LlavaOnevisionProcessor(
    image=onevision.IMAGE, patch=onevision.PATCH, newline=newline
  )
  visual = Visual(Grid(3, *FRAME), (0.0, 1.0, 2.0))
  assert processor.write_text(visual)[0] == len(want)
  np.testing.assert_allclose(
    processor.arrange(np.asarray(got), visual), np.stack(want), atol=1e-6
  )


# Images.

IMAGES = [(22, 22), (40, 90), (100, 31), (66, 66), (130, 132), (300, 90)]


def their_images(hf, images, sizes):
  """Features of the images of one prompt, each of several crops."""
  count = torch.tensor([len(sizes)])
  with torch.no_grad():
    out = hf.model.get_image_features(
      torch.stack(images), torch.tensor(sizes), batch_num_images=count
    )
  return [x.numpy() for x in out.pooler_output]


@pytest.mark.parametrize("size", IMAGES)
def test_features_of_an_image_equal_transformers(encode, size):
  hf, *_ = onevision.pair()
  grid = SMALL.choose_grid(*size, None)
  crops, pixels = onevision.make_squares(grid.time)
  (want,) = their_images(hf, [crops[:-1]], [size])
  got = SMALL.arrange(np.asarray(encode(pixels, CROP)), Visual(grid, size=size))
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert SMALL.write_text(Visual(grid, size=size))[0] == len(want)


def test_features_of_several_images_equal_transformers(encode):
  hf, *_ = onevision.pair()
  layouts = mark_several(
    [Visual(SMALL.choose_grid(*size, None), size=size) for size in IMAGES[:2]]
  )
  made = [onevision.make_squares(layout.grid.time) for layout in layouts]
  wants = their_images(hf, [crops[-1:] for crops, _ in made], IMAGES[:2])
  for layout, (_, pixels), want in zip(layouts, made, wants, strict=True):
    got = SMALL.arrange(np.asarray(encode(pixels, CROP)), layout)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert SMALL.write_text(layout)[0] == len(want) == 26


def test_features_of_more_than_nine_crops_are_resampled():
  assert SMALL.images.choose_crops(300, 90) == (6, 2)  # 30 x 10 features with padding.
  assert SMALL.images.fit_features(300, 90) == (25, 8)


# A merger that is trained.


def test_features_before_the_merger_give_those_of_a_video(encode, apart):
  sources, connect = apart
  _, pixels = onevision.make_squares(3)
  visual = Visual(Grid(3, *FRAME), (0.0,) * 3)
  want = SMALL.arrange(np.asarray(encode(pixels, FRAME)), visual)
  stored = SMALL.arrange(np.asarray(sources(pixels, FRAME)), visual)
  assert stored.shape == (28, 4 * 32 + 5)
  padded = np.pad(stored, [(0, 4), (0, 0)])
  got = connect(padded[None])[0]
  np.testing.assert_allclose(got[:28], want, atol=2e-5)
  np.testing.assert_array_equal(got[28:], 0)


@pytest.mark.parametrize("size", [(40, 90), (130, 132)])
def test_features_before_the_merger_give_those_of_an_image(encode, apart, size):
  sources, connect = apart
  grid = SMALL.choose_grid(*size, None)
  _, pixels = onevision.make_squares(grid.time)
  visual = Visual(grid, size=size)
  want = SMALL.arrange(np.asarray(encode(pixels, CROP)), visual)
  stored = SMALL.arrange(np.asarray(sources(pixels, CROP)), visual)
  np.testing.assert_allclose(connect(stored[None])[0], want, atol=2e-5)


def test_merger_has_a_gradient_from_each_of_its_parameters(apart):
  sources, _ = apart
  model = onevision.build(merged=False)
  _, pixels = onevision.make_squares(2)
  visual = Visual(Grid(2, *FRAME), (0.0, 1.0))
  features = jnp.asarray(SMALL.arrange(np.asarray(sources(pixels, FRAME)), visual))
  merger = {"merger": onevision.pair()[2]["params"]["vision"]["merger"]}
  connect = lambda params: jnp.square(
    model.projector.apply({"params": params}, features[None], method="connect").merged
  ).sum()
  for gradient in jax.tree.leaves(jax.jit(jax.grad(connect))(merger)):
    assert np.abs(gradient).max() > 0


# Parts.


def test_a_grid_that_is_neither_is_refused(encode):
  _, pixels = onevision.make_squares(1)
  with pytest.raises(ValueError, match="3 rows and columns for frames"):
    encode(pixels, (4, 4))


def test_bfloat16_is_close_to_float32(encode):
  _, model, variables = onevision.pair()
  _, pixels = onevision.make_squares(2)
  half = model.vision.clone(dtype="bfloat16", parent=None)
  params = {"params": variables["params"]["vision"]}
  got = jax.jit(half.apply, static_argnums=2)(params, pixels, FRAME)
  want = np.asarray(encode(pixels, FRAME))
  assert got.dtype == "bfloat16"
  error = np.abs(np.asarray(got, np.float32) - want).mean()
  assert error < 0.03 * np.abs(want).mean()


# Names and published sizes.


def test_to_hugging_face_is_the_inverse():
  hf, _, variables = onevision.pair()
  want = onevision.tensors_of(hf)
  got = dict(param_mapping.convert_to_hf(llava_onevision.HF, variables["params"]))
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x)


@pytest.mark.parametrize("size", llava_onevision.LLM_VARIANTS)
def test_published_sizes_have_the_tensors_of_transformers(size):
  model = vlm.VLM(
    llava_onevision.Model(**llava_onevision.VARIANTS[size]),
    projector.Connector(llava_onevision.VARIANTS[size]["out"]),
    qwen2.Model(**llava_onevision.LLM_VARIANTS[size]),
  )
  text = layers.write_fields(qwen2.CONFIG, model.llm)
  text["rope_parameters"] |= {"rope_type": "default"}
  config = transformers.LlavaOnevisionConfig(
    text_config={**text, "model_type": "qwen2"}, tie_word_embeddings=model.llm.tied
  )
  with torch.device("meta"):
    hf = transformers.LlavaOnevisionForConditionalGeneration(config)
  want = {name: tuple(x.shape) for name, x in onevision.tensors_of(hf).items()}
  shapes = vlm.get_param_shapes(model)
  assert param_mapping.get_hf_shapes(llava_onevision.HF, shapes) == want
  assert lora.count_params(shapes) == hf.num_parameters()
  flat = flax.traverse_util.flatten_dict(shapes, sep="/")
  unused = set(llava_onevision.HF) - set(flat)
  assert unused == ({"llm/lm_head/kernel"} if model.llm.tied else set())
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules({"params": shapes}, families.SHARDING, mesh)
