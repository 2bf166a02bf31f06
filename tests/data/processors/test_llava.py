import numpy as np
import pytest

from vlmrlaif_jax.data.processors.interface import Grid, Visual, lay_out
from vlmrlaif_jax.data.processors.llava import LlavaProcessor, lay_out_features
from vlmrlaif_jax.data.video import ByCount, Reading

PROCESSOR = LlavaProcessor(frames=4, image=16, patch=4)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 16), (4, 4 + 16)])
def test_a_video_is_one_run_of_its_pooled_tokens(frames, tokens):
  grid = PROCESSOR.choose_grid(90, 50, frames)
  assert grid == Grid(frames, 4, 4)
  video = lay_out(PROCESSOR, Visual(grid))
  assert video.texts == [[tokens, "\n"]]
  np.testing.assert_array_equal(video.blocks, [np.arange(tokens)[:, None]])


def test_a_run_of_features_is_laid_out_as_by_the_processor():
  want, got = lay_out(PROCESSOR, Visual(Grid(4, 4, 4))), lay_out_features(20)
  assert (got.texts, got.axes) == (want.texts, want.axes)
  np.testing.assert_array_equal(got.blocks, want.blocks)
  assert lay_out_features(0).texts == ()


def test_all_videos_have_one_layout_and_are_read_as_squares():
  assert PROCESSOR.layout == Visual(Grid(4, 4, 4))
  assert PROCESSOR.make_reading("pyav") == Reading(ByCount(4), square=16)


def test_a_part_has_its_own_frames():
  assert PROCESSOR.layout.select(1, 3) == Visual(Grid(2, 4, 4))
  assert PROCESSOR.layout.select(0, None) == PROCESSOR.layout


def test_a_limit_of_videos_that_differ_is_an_error():
  assert PROCESSOR.limit(0.0, 0, 0).fix_grids() == PROCESSOR
  assert PROCESSOR.find_max_layout() == PROCESSOR.layout
  with pytest.raises(ValueError, match=r"fps=2.0, max_pixels=9: .* 4 frames .* Set 0"):
    PROCESSOR.limit(2.0, 0, 9)
