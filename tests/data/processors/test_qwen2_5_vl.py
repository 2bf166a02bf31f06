import math

import numpy as np
import pytest
import torch
import transformers

from tests.data.processors.clips import assert_pixels_close, make_frames, process
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.data.processors.interface import Grid, Visual, make_positions
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor

DEFAULT = Qwen25VLProcessor()

# Configs.

CONFIG = {
  "min_pixels": 3136,
  "max_pixels": 12_845_056,
  "patch_size": 14,
  "temporal_patch_size": 2,
  "merge_size": 2,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
  "image_processor_type": "Qwen2VLImageProcessor",
  "processor_class": "Qwen2_5_VLProcessor",
}

MODEL = {"vision_config": {"tokens_per_second": 2}}


def test_defaults_are_those_of_published_checkpoints():
  assert Qwen25VLProcessor.from_config(CONFIG, CONFIG, MODEL) == (DEFAULT, [])


def test_settings_are_read_from_configs():
  video = {**CONFIG, "max_pixels": 90_000, "cap_pixels_per_frame": True}
  faster = {"vision_config": {"tokens_per_second": 4}}
  got, problems = Qwen25VLProcessor.from_config(CONFIG, video, faster)
  want = Qwen25VLProcessor(
    max_pixels=90_000, max_video_tokens=128_000, tokens_per_second=4
  )
  assert (got, problems) == (want, [])


# Frames.


@pytest.mark.parametrize(
  "total, rate, want",
  [
    (30, 10.0, [0, 5, 10, 15, 20, 25]),  # 2 of each of 3 seconds.
    (35, 10.0, [0, 5, 11, 17, 23, 29]),  # 7, of which an even number is read.
    (24, 24.0, [0, 6, 12, 18]),  # A second has 2, but 4 are the least.
    (3, 24.0, [0, 1]),
    (1, 24.0, [0]),
    (96, None, [0, 12, 24, 36, 48, 60, 72, 84]),  # Unknown: 24 per second.
  ],
)
def test_frames_are_sampled_by_their_rate(total, rate, want):
  assert DEFAULT.sample_frames(total, rate).tolist() == want


def test_long_video_has_at_most_the_greatest_number_of_frames():
  assert len(DEFAULT.sample_frames(100_000, 25.0)) == 768


# Grids.


@pytest.mark.parametrize(
  "height, width, frames, want",
  [
    (360, 640, 8, Grid(4, 26, 46)),  # 364 x 644 pixels.
    (360, 640, 7, Grid(4, 26, 46)),
    (30, 30, 2, Grid(1, 4, 4)),  # 3136 pixels at least.
    (8000, 6000, None, Grid(1, 294, 220)),  # 12,845,056 pixels at most.
  ],
)
def test_grid_follows_from_the_size_and_the_pixels(height, width, frames, want):
  assert DEFAULT.choose_grid(height, width, frames) == want


def test_tokens_of_a_video_can_be_limited():
  limited = Qwen25VLProcessor(max_video_tokens=1000)
  # 900 tokens, of which each of 10 temporal patches has 90.
  assert limited.choose_grid(560, 560, 20) == Grid(10, 18, 18)
  assert limited.choose_grid(560, 560, None) == Grid(1, 40, 40)


# Text and positions.


def test_text_of_a_video_is_one_run_of_placeholders():
  text = DEFAULT.write_text(Visual(Grid(3, 4, 6), seconds=(0, 1, 2, 3, 4, 5), rate=1))
  assert text == ["<|vision_start|>", 18, "<|vision_end|>"]


def positions_of(visuals, text, processor=DEFAULT):
  """Positions of a text in which "v" marks a placeholder."""
  blocks = [block for visual in visuals for block in processor.list_blocks(visual)]
  has_feature = np.array([letter == "v" for letter in text])
  return make_positions(has_feature, blocks, axes=3)


def parse_table(text):
  return np.array(text.split(), int).reshape(3, -1).T


def clip(time, height, width, rate):
  return Visual(Grid(time, height, width), tuple(np.arange(2 * time) / rate), rate)


def test_positions_of_a_video_equal_a_table():
  # A temporal patch lasts 1 second, which has 2 positions.
  got = positions_of([clip(3, 2, 4, rate=2)], "..vvvvvv..")
  table = """
    0 1 2 2 4 4 6 6 7 8
    0 1 2 2 2 2 2 2 7 8
    0 1 2 3 2 3 2 3 7 8"""
  np.testing.assert_array_equal(got, parse_table(table))


def test_text_behind_a_long_video_continues_after_its_end():
  got = positions_of([clip(8, 4, 4, rate=2)], ".." + "v" * 32 + "...")
  assert got[33].tolist() == [16, 3, 3]
  assert got[34:].tolist() == [[17] * 3, [18] * 3, [19] * 3]


def test_positions_on_the_time_axis_are_rounded_down():
  # A temporal patch lasts 2 / 3 seconds: 0, 1.33, 2.67, 4.
  got = positions_of([clip(4, 2, 2, rate=3)], "vvvv.")
  assert got[:, 0].tolist() == [0, 1, 2, 4, 5]
  slower = Qwen25VLProcessor(tokens_per_second=4)
  got = positions_of([clip(4, 2, 2, rate=3)], "vvvv.", slower)
  assert got[:, 0].tolist() == [0, 2, 5, 8, 9]


def test_wide_image_is_followed_by_the_position_after_its_width():
  got = positions_of([Visual(Grid(1, 2, 8))], ".vvvv.")
  table = """
    0 1 1 1 1 5
    0 1 1 1 1 5
    0 1 2 3 4 5"""
  np.testing.assert_array_equal(got, parse_table(table))


@pytest.fixture(scope="module")
def their_model():
  small = dict(hidden_size=32, intermediate_size=32)
  heads = dict(num_attention_heads=2, num_key_value_heads=2)
  config = transformers.Qwen2_5_VLConfig(
    text_config=dict(**small, **heads, num_hidden_layers=1, vocab_size=9),
    vision_config=dict(**small, depth=1, num_heads=2, tokens_per_second=2),
  )
  with torch.device("meta"):
    return transformers.Qwen2_5_VLModel(config)


@pytest.mark.parametrize("rate", [0.5, 1, 1.9, 2, 2.3, 3, 25])
def test_positions_of_a_video_equal_transformers(their_model, rate):
  # Nothing follows the video, where transformers 5.24 continues too early.
  video = clip(9, 4, 6, rate)
  kinds = torch.tensor([[0, 0] + [2] * 54])
  want, _ = their_model.get_rope_index(
    torch.ones_like(kinds),
    kinds,
    video_grid_thw=torch.tensor([video.grid]),
    second_per_grid_ts=torch.tensor([2 / rate]),
  )
  got = positions_of([video], ".." + "v" * 54)
  np.testing.assert_array_equal(got, want[:, 0].T.numpy())


def test_positions_of_images_equal_transformers(their_model):
  images = [Visual(Grid(1, 4, 6)), Visual(Grid(1, 8, 2))]
  kinds = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]])
  grids = torch.tensor([image.grid for image in images])
  want, _ = their_model.get_rope_index(torch.ones_like(kinds), kinds, grids)
  got = positions_of(images, ".vvvvvv..vvvv.")
  np.testing.assert_array_equal(got, want[:, 0].T.numpy())


# transformers' processors.

VIDEOS = {  # Name -> (frames, height, width, settings).
  "same size": (4, 56, 84, {}),
  "larger": (4, 90, 75, {"min_pixels": 20_000}),
  "smaller": (5, 360, 640, {"max_pixels": 50_000}),
  "limited": (6, 300, 400, {"max_video_tokens": 100}),
}


def size_of(processor):
  return dict(
    size={"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
  )


LIMITED = DEFAULT.limit(fps=0.0, max_frames=8, max_pixels=100_000)


def video_call(count, height, width, settings, **sampling):
  ours = Qwen25VLProcessor(**settings)
  limits = dict(
    cap_pixels_per_frame=ours.max_video_tokens > 0,
    max_video_tokens=ours.max_video_tokens,
  )
  return Call(
    "Qwen2VLVideoProcessor",
    {**size_of(ours), **limits},
    dict(videos=[make_frames(count, height, width)], **sampling),
  )


@pytest.fixture(scope="module")
def theirs():
  """Name -> output of transformers; all in one process, which starts slowly."""
  calls = {name: video_call(*case) for name, case in VIDEOS.items()}
  limited = dict(max_video_tokens=LIMITED.max_video_tokens)
  calls["pixels"] = video_call(8, 200, 120, limited)
  metadata = [dict(total_num_frames=35, fps=10.0)]
  calls["sampled"] = video_call(
    35, 56, 56, {}, do_sample_frames=True, fps=2, video_metadata=metadata
  )
  calls["image"] = Call(
    "Qwen2VLImageProcessor",
    size_of(DEFAULT),
    dict(images=[make_frames(1, 100, 130)[0]]),
  )
  return dict(zip(calls, run_calls(list(calls.values())), strict=True))


@pytest.mark.torchvision
@pytest.mark.parametrize("name", VIDEOS)
def test_pixels_of_a_video_equal_transformers(theirs, name):
  count, height, width, settings = VIDEOS[name]
  processor = Qwen25VLProcessor(**settings)
  grid = processor.choose_grid(height, width, count)
  assert list(grid) == theirs[name]["video_grid_thw"][0].tolist()
  got = process(processor, make_frames(count, height, width))
  want = theirs[name]["pixel_values_videos"]
  assert_pixels_close(got.pixels, want, max(DEFAULT.std))


@pytest.mark.torchvision
def test_limited_grid_equals_transformers_and_keeps_the_limit(theirs):
  grid = LIMITED.choose_grid(200, 120, 8)
  assert list(grid) == theirs["pixels"]["video_grid_thw"][0].tolist()
  assert 0.8 * 100_000 < 8 * grid.height * grid.width * 14**2 <= 100_000


@pytest.mark.torchvision
def test_sampled_frames_equal_transformers(theirs):
  frames = make_frames(35, 56, 56)[DEFAULT.sample_frames(35, 10.0)]
  grid = DEFAULT.choose_grid(56, 56, len(frames))
  assert list(grid) == theirs["sampled"]["video_grid_thw"][0].tolist()
  got = process(DEFAULT, frames)
  want = theirs["sampled"]["pixel_values_videos"]
  assert_pixels_close(got.pixels, want, max(DEFAULT.std))


@pytest.mark.torchvision
def test_pixels_of_an_image_equal_transformers(theirs):
  grid = DEFAULT.choose_grid(100, 130, None)
  assert list(grid) == theirs["image"]["image_grid_thw"][0].tolist()
  assert math.prod(grid) == len(theirs["image"]["pixel_values"])
  got = process(DEFAULT, make_frames(1, 100, 130))
  assert_pixels_close(got.pixels, theirs["image"]["pixel_values"], max(DEFAULT.std))
