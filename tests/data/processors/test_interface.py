import numpy as np
import pytest

from vlmrlaif_jax.data.processors import interface
from vlmrlaif_jax.data.processors.interface import Grid, Visual
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor
from vlmrlaif_jax.data.video import Frames

LINE = np.arange(3)[:, None]
SQUARE = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])


def marks(text):
  return np.array([letter == "v" for letter in text])


def test_one_run_of_placeholders_is_counted_like_text():
  got = interface.make_positions(marks("..vvv.."), [LINE], axes=1)
  np.testing.assert_array_equal(got[:, 0], np.arange(7))


def test_text_without_a_video_is_counted():
  got = interface.make_positions(marks("..."), [], axes=3)
  np.testing.assert_array_equal(got, [[0] * 3, [1] * 3, [2] * 3])


def test_what_follows_a_block_continues_after_its_greatest_position():
  got = interface.make_positions(marks(".vvvv."), [SQUARE], axes=3)
  want = [[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [3, 3, 3]]
  np.testing.assert_array_equal(got, want)


def test_neighboring_blocks_follow_each_other():
  got = interface.make_positions(marks("vvvvvvvv"), [SQUARE, SQUARE], axes=3)
  np.testing.assert_array_equal(got[4:], SQUARE + 2)


@pytest.mark.parametrize("text, blocks", [("..", [LINE]), ("vvvv", [LINE]), ("v", [])])
def test_other_numbers_of_placeholders_are_an_error(text, blocks):
  with pytest.raises(ValueError, match=r"has \d placeholders, but .* have \d features"):
    interface.make_positions(marks(text), blocks, axes=1)


def test_split_runs_are_an_error():
  with pytest.raises(ValueError, match="3 placeholders from token 1 on .* at token 4"):
    interface.make_positions(marks(".vv.v."), [LINE], axes=1)


@pytest.mark.parametrize(
  "size, want",
  [
    ((22, 40), (18, 32)),
    ((40, 22), (32, 18)),
    ((30, 34), (24, 24)),
    ((2, 2), (24, 24)),
  ],
)
def test_nearest_size_is_chosen(size, want):
  sizes = [(24, 24), (18, 32), (32, 18)]
  assert interface.fix_grid(Grid(7, *size), sizes) == Grid(7, *want)


@pytest.mark.parametrize(
  "count, want",
  [
    (2, Visual(Grid(1, 4, 4), (0.0, 0.4), rate=2.5)),
    (1, Visual(Grid(1, 4, 4), (0.0,), rate=2.5)),  # An image has no rate.
  ],
)
def test_layout_has_the_rate_of_a_video(count, want):
  pixels, seconds = np.zeros((count, 56, 56, 3), np.uint8), np.arange(count) * 0.4
  frames = Frames(pixels, seconds, (56, 56), 2.5)
  _, layout = interface.process_frames(Qwen25VLProcessor(), frames)
  assert layout == want
