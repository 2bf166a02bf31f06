import numpy as np
import pytest

from vlmrlaif_jax.data.processors.interface import Grid, Visual, lay_out
from vlmrlaif_jax.data.processors.llava import LlavaProcessor, lay_out_features

PROCESSOR = LlavaProcessor(frames=4, image=16, patch=4)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 16), (4, 4 + 16)])
def test_a_video_is_one_run_of_its_pooled_tokens(frames, tokens):
  grid = PROCESSOR.choose_grid(90, 50, frames)
  assert grid == Grid(frames, 4, 4)
  video = lay_out(PROCESSOR, Visual(grid))
  assert video.text == [tokens, "\n"]
  np.testing.assert_array_equal(video.blocks, [np.arange(tokens)[:, None]])


def test_a_run_of_features_is_laid_out_as_by_the_processor():
  want, got = lay_out(PROCESSOR, Visual(Grid(4, 4, 4))), lay_out_features(20)
  assert (got.text, got.axes) == (want.text, want.axes)
  np.testing.assert_array_equal(got.blocks, want.blocks)
  assert lay_out_features(0).text == []


def test_frames_are_evenly_spaced():
  np.testing.assert_array_equal(PROCESSOR.sample_frames(8, 24.0), [0, 2, 4, 7])
