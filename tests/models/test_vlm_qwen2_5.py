"""A whole Qwen2.5-VL against transformers: rows of several grids, padded on the left.

transformers gets our positions, because its own are wrong after a video.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import qwen, qwen2_5
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch
from vlmrlaif_jax.data.processors.interface import Grid, Visual, lay_out, make_positions
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor
from vlmrlaif_jax.sampling.generate import generate

PROCESSOR = Qwen25VLProcessor(patch=4)
VIDEOS = [  # Of 8 seconds, which is longer than its sides are wide, and of 2.
  Visual(Grid(8, 4, 4), tuple(np.arange(16) / 2), rate=2.0),
  Visual(Grid(3, 4, 6), tuple(np.arange(6) / 3), rate=3.0),
]
QUESTIONS = ([7, 8, 9, 10], [11, 12])
CHANNELS = 6 * 4**2
TIME, VIDEO_LEN, VOCAB, NEW = 44, 40, 55, 6  # Ids from VOCAB on are not sampled.


def ids_of(number):
  """A row, with VIDEO_TOKEN for the placeholders of its video."""
  start, count, end = PROCESSOR.write_text(VIDEOS[number])
  assert (start, end) == ("<|vision_start|>", "<|vision_end|>")
  marks = [qwen.VISION_START, *[VIDEO_TOKEN] * count, qwen.VISION_END]
  return [1, *marks, *QUESTIONS[number]]


def pixels_of(number):
  patches = np.prod(VIDEOS[number].grid)
  return np.random.default_rng(number).normal(size=(patches, CHANNELS)).astype("f4")


@pytest.fixture(scope="module")
def batch():
  """Two rows, whose videos have other grids and whose questions have other lengths."""
  _, model, variables = qwen2_5.pair()
  tokens, mask = np.zeros((2, TIME), int), np.zeros((2, TIME), bool)
  positions = np.zeros((2, TIME, 3), int)
  features = np.full((2, VIDEO_LEN, *model.vision.feature_shape), 9.0, np.float32)
  for i in (0, 1):
    ids = ids_of(i)
    here = slice(TIME - len(ids), TIME)
    tokens[i, here], mask[i, here] = ids, True
    blocks = lay_out(PROCESSOR, VIDEOS[i]).blocks
    positions[i, here] = make_positions(np.array(ids) == VIDEO_TOKEN, blocks, axes=3)
    encoded = qwen.encode(model, variables, pixels_of(i), VIDEOS[i].grid)
    features[i, : len(encoded)] = encoded
  return Batch(*map(jnp.asarray, (features, tokens, mask, mask & False, positions)))


def test_logits_equal_transformers_from_pixels(batch):
  hf, model, variables = qwen2_5.pair()
  tokens, mask = np.asarray(batch.tokens, np.int64), np.asarray(batch.mask)
  with torch.no_grad():
    want = hf(
      input_ids=torch.tensor(np.where(tokens == VIDEO_TOKEN, qwen.VIDEO_PAD, tokens)),
      attention_mask=torch.tensor(mask).long(),
      position_ids=torch.tensor(np.moveaxis(np.asarray(batch.positions), -1, 0)),
      pixel_values_videos=torch.tensor(np.concatenate([pixels_of(0), pixels_of(1)])),
      video_grid_thw=torch.tensor([v.grid for v in VIDEOS]),
    ).logits.numpy()[mask]
  got = np.asarray(jax.jit(model.apply)(variables, batch))[mask]
  assert np.std(want) > 0.3
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_sampled_tokens_are_those_of_a_loop_over_transformers(batch):
  hf, model, variables = qwen2_5.pair()
  sample = functools.partial(
    generate, model, max_new=NEW, temperature=0.0, stops=(99,), pad=0, vocab=VOCAB
  )
  got = jax.jit(sample)(variables, batch, jax.random.key(0)).batch
  # After the last position of the question, which follows the end of the video.
  assert got.positions[0, TIME:, 0].tolist() == list(range(22, 22 + NEW))
  for i, video in enumerate(VIDEOS):
    ids = np.array([ids_of(i)])
    given = {
      "input_ids": np.where(ids == VIDEO_TOKEN, qwen.VIDEO_PAD, ids),
      "video_grid_thw": [video.grid],
      "second_per_grid_ts": np.float32([2 / video.rate]),
      "pixel_values_videos": pixels_of(i),
    }
    want = qwen2_5.say(hf, given, NEW, eos=99, vocab=VOCAB)
    assert got.tokens[i, TIME:].tolist() == want
