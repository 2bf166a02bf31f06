"""A whole Qwen3-VL against transformers: rows of several grids, padded on the left.

The first row has a video, and an image within its question; the second has a video.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import qwen
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import (
  VIDEO_TOKEN,
  Batch,
  Groups,
  PackedBatch,
  continue_positions,
  flatten_groups,
)
from vlmrlaif_jax.data.processors.interface import Grid, Visual, lay_out, make_positions
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.huggingface import families
from vlmrlaif_jax.models import vlm

PROCESSOR = Qwen3VLProcessor(patch=4)
VIDEOS = [
  Visual(Grid(2, 4, 6), (0.0, 0.5, 1.0, 1.5)),
  Visual(Grid(3, 4, 4), (0.0,) * 6),
]
IMAGE = Visual(Grid(1, 4, 4))
ROWS = [[VIDEOS[0], [7, 8], IMAGE, [9, 10]], [VIDEOS[1], [11, 12]]]
CHANNELS = 6 * 4**2
TIME, VIDEO_LEN = 40, 16  # 12 tokens of each video, 4 of the image, and padding.


def ids_of(visual):
  """Numbers for the text of a video; its placeholders as VIDEO_TOKEN."""
  ids = []
  for part in PROCESSOR.write_text(visual):
    if isinstance(part, int):
      ids += [VIDEO_TOKEN] * part
    else:
      times = [5, 6] if "seconds" in part else []
      ids += [*times, qwen.VISION_START] if "start" in part else [qwen.VISION_END]
  return ids


def pixels_of(visual):
  patches = np.prod(visual.grid)
  return np.random.default_rng(patches).normal(size=(patches, CHANNELS)).astype("f4")


@pytest.fixture(scope="module")
def batch():
  """Two rows, whose videos have other grids and numbers, and other questions."""
  _, model, variables = qwen.pair()
  tokens, mask = np.zeros((2, TIME), int), np.zeros((2, TIME), bool)
  positions = np.zeros((2, TIME, 3), int)
  features = np.full((2, VIDEO_LEN, *model.vision.feature_shape), 9.0, np.float32)
  for i, row in enumerate(ROWS):
    media = [part for part in row if isinstance(part, Visual)]
    ids = [1]
    for part in row:
      ids += ids_of(part) if part in media else part
    here = slice(TIME - len(ids), TIME)
    tokens[i, here], mask[i, here] = ids, True
    blocks = lay_out(PROCESSOR, *media).blocks
    positions[i, here] = make_positions(np.array(ids) == VIDEO_TOKEN, blocks, axes=3)
    encoded = [qwen.encode(model, variables, pixels_of(x), x.grid) for x in media]
    features[i, : sum(map(len, encoded))] = np.concatenate(encoded)
  return Batch(*map(jnp.asarray, (features, tokens, mask, mask & False, positions)))


def their_logits(batch):
  """The logits of each real token, from pixels."""
  hf, _, _ = qwen.pair()
  kinds = 2 * (np.asarray(batch.tokens) == VIDEO_TOKEN)  # 2 is a video, 1 an image.
  kinds[0, np.flatnonzero(kinds[0])[-4:]] = 1
  names = np.array([0, qwen.IDS["image_pad"], qwen.VIDEO_PAD])[kinds]
  tokens = np.where(kinds, names, np.asarray(batch.tokens, np.int64))
  with torch.no_grad():
    out = hf(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(np.asarray(batch.mask)).long(),
      pixel_values_videos=torch.tensor(np.concatenate(list(map(pixels_of, VIDEOS)))),
      video_grid_thw=torch.tensor([v.grid for v in VIDEOS]),
      pixel_values=torch.tensor(pixels_of(IMAGE)),
      image_grid_thw=torch.tensor([IMAGE.grid]),
      mm_token_type_ids=torch.tensor(kinds),
    )
  return out.logits.numpy()[np.asarray(batch.mask)]


def apply(*inputs, method="__call__", **settings):
  _, model, variables = qwen.pair()
  return jax.jit(
    functools.partial(model.apply, method=method, **settings),
    static_argnames="slots",
  )(variables, *inputs)


def test_logits_equal_transformers_from_pixels(batch):
  want = their_logits(batch)
  got = np.asarray(apply(batch))[np.asarray(batch.mask)]
  assert np.std(want) > 0.3
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_padding_of_features_changes_nothing(batch):
  longer = jnp.pad(batch.video, [(0, 0), (0, 5), (0, 0)], constant_values=3.0)
  got, want = apply(batch._replace(video=longer)), apply(batch)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_deepstack_features_matter(batch):
  embed = qwen.pair()[1].llm.embed
  without = batch._replace(video=batch.video.at[..., embed:].set(0))
  assert np.abs(apply(without) - apply(batch))[:, -1].max() > 1e-2


@pytest.fixture(scope="module")
def groups(batch):
  tokens = jnp.asarray(np.random.default_rng(0).integers(3, 55, (2, 3, 5)))
  mask = jnp.arange(5) < jnp.asarray([[5, 2, 1], [3, 4, 5]])[..., None]
  return Groups(batch, tokens, mask, mask, continue_positions(batch, mask))


@pytest.mark.parametrize("shared", [False, True])
def test_groups_have_the_states_of_rows(batch, groups, shared):
  want = apply(flatten_groups(groups), method="hidden").reshape(2, 3, TIME + 5, -1)
  got = apply(groups, method="hidden_groups", shared=shared)
  real = np.asarray(groups.mask)
  np.testing.assert_allclose(got.prompts, want[:, 0, TIME - 1], atol=1e-5)
  np.testing.assert_allclose(got.responses[real], want[:, :, TIME:][real], atol=1e-5)


def test_packed_rows_have_the_states_of_rows(batch):
  want = apply(batch, method="hidden")
  mask = np.asarray(batch.mask)
  row = lambda x: jnp.concatenate([x[i][mask[i]] for i in (0, 1)])[None]
  segments = np.repeat([1, 2], mask.sum(axis=1))[None]
  packed = PackedBatch(
    batch.video[::-1][None], jnp.array([[1, 0]]), row(batch.tokens),
    jnp.asarray(segments), row(batch.mask), row(batch.positions),
  )  # fmt: skip
  got = apply(packed, method="hidden")
  np.testing.assert_allclose(got, row(want), atol=1e-5)


def test_cached_decoding_equals_the_full_forward(batch):
  want, cut = apply(batch, method="hidden"), TIME - 2
  prompt = Batch(batch.video, *(x[:, :cut] for x in batch[1:]))
  hidden, caches = apply(prompt, method="prefill", slots=TIME)
  np.testing.assert_allclose(hidden, want[:, cut - 1], atol=1e-5)
  for t in range(cut, TIME):
    token, position = batch.tokens[:, t], batch.positions[:, t, 0]
    seen = batch.mask & (jnp.arange(TIME) <= t)
    hidden, caches = apply(token, position, jnp.int32(t), seen, caches, method="decode")
    np.testing.assert_allclose(hidden, want[:, t], atol=1e-5)


def test_logits_on_a_mesh_equal_those_on_one_device(batch):
  _, model, variables = qwen.pair()
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  places = sharding.shard_by_rules(variables, families.SHARDING, mesh)
  spread = jax.device_put(variables, places), sharding.shard_batch(batch, mesh)
  got = jax.jit(model.apply)(*spread)
  np.testing.assert_allclose(got, apply(batch), atol=1e-5)


def test_features_are_not_encoded_again(batch):
  _, model, variables = qwen.pair()
  again = vlm.encode_video(model, variables, batch)
  np.testing.assert_array_equal(again.video, batch.video)


def test_init_has_no_projector():
  shapes = vlm.get_variable_shapes(qwen.build(rank=2))
  assert set(shapes["params"]) == {"vision", "llm"} and "lora" in shapes
