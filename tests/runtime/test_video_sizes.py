"""The vision tower is compiled once for each size of frames in a short list."""

import jax
import numpy as np

from tests.data.processors.clips import process
from tests.helpers import qwen
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.data.processors.sizes import list_sizes
from vlmrlaif_jax.runtime import video

OWN = Qwen3VLProcessor(patch=4, min_pixels=64, fps=1.0)
PROCESSOR = OWN.limit(0.0, 4, 4 * 1024).fix_grids()


def test_videos_of_many_sizes_compile_as_many_programs_as_the_list_has_in_use():
  _, model, variables = qwen.pair()
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  rng = np.random.default_rng(0)
  sizes = {tuple(size) for size in rng.integers(16, 160, (30, 2)).tolist()}
  assert len(sizes) == 30
  videos = [
    process(PROCESSOR, np.zeros((2, *size, 3), np.uint8)) for size in sorted(sizes)
  ]
  video.make_encoder.cache_clear()
  features = video.encode_batch(model, variables, mesh, 2, videos)
  used = {tuple(each.grid[1:]) for each in videos}
  programs = video.make_encoder.cache_info().currsize
  compiled = [video.make_encoder(model, mesh, size)._cache_size() for size in used]
  assert programs == len(used) and compiled == [1] * len(used)
  assert used <= set(list_sizes(*PROCESSOR.frame_limits, 4, 2)) and len(used) < 20
  for each, found in zip(videos, features, strict=True):
    tokens = each.grid.height * each.grid.width // 4
    assert found.shape == (1, tokens, *model.vision.feature_shape)
