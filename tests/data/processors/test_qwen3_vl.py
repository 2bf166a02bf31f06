import re

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from tests.data.processors.clips import assert_pixels_close, make_frames, process
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.data.processors import temporal_patches
from vlmrlaif_jax.data.processors.interface import Grid, Visual, make_positions
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor

DEFAULT = Qwen3VLProcessor()

# Configs.

SHARED = {
  "patch_size": 16,
  "temporal_patch_size": 2,
  "merge_size": 2,
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
  "processor_class": "Qwen3VLProcessor",
}
IMAGE_CONFIG = {
  **SHARED,
  "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
  "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEO_CONFIG = {
  **SHARED,
  "size": {"longest_edge": 25_165_824, "shortest_edge": 4096},
  "video_processor_type": "Qwen3VLVideoProcessor",
}


def test_defaults_are_those_of_published_checkpoints():
  got = Qwen3VLProcessor.from_config(IMAGE_CONFIG, VIDEO_CONFIG, {})
  assert got == (DEFAULT, [])


def test_settings_are_read_from_configs():
  video = {**VIDEO_CONFIG, "fps": 1, "max_frames": 9, "max_pixels": 7000}
  video |= {"cap_pixels_per_frame": True, "max_video_tokens": 64}
  got, problems = Qwen3VLProcessor.from_config(
    {**IMAGE_CONFIG, "size": None}, video, {}
  )
  want = Qwen3VLProcessor(fps=1.0, max_frames=9, max_pixels=7000, max_frame_tokens=64)
  assert (got, problems) == (want, [])


@pytest.mark.parametrize(
  "changed, problem",
  [
    ({"resample": 2}, "resample of the video processor must be 3, not 2"),
    ({"do_resize": False}, "do_resize .* must be True, not False"),
    ({"temporal_patch_size": 1}, "temporal_patch_size .* must be 2, not 1"),
    ({"patch_size": 14}, "patch_size .* must be 16, as of the image processor, not 14"),
    ({"crop_size": 9}, "crop_size=9 of the video processor is not supported"),
  ],
)
def test_keys_that_are_not_supported_are_named(changed, problem):
  video = {**VIDEO_CONFIG, **changed}
  _, (line,) = Qwen3VLProcessor.from_config(IMAGE_CONFIG, video, {})
  assert re.match(problem, line)


# Frames.


@pytest.mark.parametrize(
  "total, rate, want",
  [
    (10, 2.0, range(10)),
    (30, 10.0, [0, 6, 12, 17, 23, 29]),  # 2 of each of 3 seconds.
    (24, 24.0, [0, 8, 15, 23]),  # A second has 2, but 4 are the least.
    (3, 24.0, [0, 1, 2]),  # All that there are.
    (96, None, [0, 14, 27, 41, 54, 68, 81, 95]),  # Unknown: 24 per second.
  ],
)
def test_frames_are_sampled_by_their_rate(total, rate, want):
  assert DEFAULT.sample_frames(total, rate).tolist() == list(want)


def test_long_video_has_at_most_the_greatest_number_of_frames():
  indices = DEFAULT.sample_frames(100_000, 25.0)
  assert len(indices) == 768 and indices[0] == 0 and indices[-1] == 99_999


# Grids.


@pytest.mark.parametrize(
  "height, width, frames, want",
  [
    (360, 640, 8, Grid(4, 22, 40)),  # 352 x 640 pixels.
    (360, 640, 7, Grid(4, 22, 40)),
    (360, 640, 1, Grid(1, 22, 40)),
    (1080, 1920, 768, Grid(384, 8, 14)),  # 25 million pixels in all.
    (20, 40, 2, Grid(1, 2, 4)),  # 32 x 64 pixels.
    (32, 32, 2, Grid(1, 4, 4)),  # 4096 pixels in all.
    (1080, 1920, None, Grid(1, 68, 120)),
    (64, 64, None, Grid(1, 16, 16)),  # 65,536 pixels.
  ],
)
def test_grid_follows_from_the_size_and_the_pixels(height, width, frames, want):
  assert DEFAULT.choose_grid(height, width, frames) == want


def test_tokens_of_a_frame_can_be_limited():
  limited = Qwen3VLProcessor(max_frame_tokens=64)
  assert limited.choose_grid(1080, 1920, 8) == Grid(4, 12, 20)


@pytest.mark.parametrize("frames", [2, None])
def test_long_side_is_an_error(frames):
  with pytest.raises(ValueError, match="frames of 20000 x 64 .* at most 200 times"):
    DEFAULT.choose_grid(20_000, 64, frames)


# Pixels.


def test_patches_of_a_square_are_neighbors():
  frames = np.zeros((2, 4, 8, 3), np.float32)
  frames[..., 0] = np.arange(8).reshape(1, 1, 8) // 2 + 4 * (
    np.arange(4).reshape(1, 4, 1) // 2
  )
  patches = temporal_patches.cut_temporal_patches(frames, patch=2, merge=2)
  assert patches[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_channels_are_color_frame_row_and_column():
  frames = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).astype(np.float32)
  patch = temporal_patches.cut_temporal_patches(frames, patch=4, merge=1)
  np.testing.assert_array_equal(patch.reshape(3, 2, 4, 4), np.moveaxis(frames, -1, 0))


def test_last_frame_fills_the_last_temporal_patch():
  frames = np.zeros((3, 32, 32, 3), np.uint8)
  frames[2] = 255
  pixels = DEFAULT.process(frames, Grid(2, 2, 2)).pixels
  assert pixels.shape == (8, 1536) and pixels.dtype == np.float32
  assert np.all(pixels[:4] == -1) and np.all(pixels[4:] == 1)


def test_images_have_a_mean_and_deviation_of_their_own():
  image = {"image_mean": [0.0, 0.5, 1.0], "image_std": [1.0, 0.5, 0.25]}
  processor, problems = Qwen3VLProcessor.from_config(
    image, {"image_mean": [0.5] * 3}, {}
  )
  assert problems == []
  white = np.full((1, 32, 32, 3), 255, np.uint8)
  pixels = processor.process(white, Grid(1, 2, 2)).pixels.reshape(4, 3, -1)
  np.testing.assert_allclose(pixels[..., 0], [[1.0, 1.0, 0.0]] * 4)
  video = processor.process(white.repeat(2, 0), Grid(1, 2, 2)).pixels
  np.testing.assert_allclose(video, 1.0)


# Text.


def test_text_of_a_video_names_the_mean_times_of_pairs_of_frames():
  visual = Visual(Grid(2, 4, 4), seconds=(0.0, 0.5, 1.04))
  assert DEFAULT.write_text(visual) == [
    "<|vision_start|>",
    "<0.2 seconds><|vision_start|>",
    4,
    "<|vision_end|>",
    "<1.0 seconds><|vision_start|>",
    4,
    "<|vision_end|>",
    "<|vision_end|>",
  ]


def test_text_of_an_image_has_no_time():
  text = DEFAULT.write_text(Visual(Grid(1, 4, 6)))
  assert text == ["<|vision_start|>", 6, "<|vision_end|>"]


# Positions.


def positions_of(visuals, text):
  """Positions of a text in which "v" marks a placeholder."""
  blocks = [block for visual in visuals for block in DEFAULT.list_blocks(visual)]
  has_feature = np.array([letter == "v" for letter in text])
  return make_positions(has_feature, blocks, axes=3)


VIDEO = Visual(Grid(2, 4, 6), seconds=(0.0, 0.5, 1.0, 1.5))
IMAGE = Visual(Grid(1, 8, 4))


def test_positions_of_a_video_equal_a_table():
  got = positions_of([VIDEO], "..vvvvvv.vvvvvv..")
  want = """
    0 1 2 2 2 2 2 2 5 6 6 6 6 6 6  9 10
    0 1 2 2 2 3 3 3 5 6 6 6 7 7 7  9 10
    0 1 2 3 4 2 3 4 5 6 7 8 6 7 8  9 10"""
  table = np.array(want.split(), int).reshape(3, -1).T
  np.testing.assert_array_equal(got, table)


def test_positions_of_an_image_equal_a_table():
  got = positions_of([IMAGE], ".vvvvvvvv..")
  want = """
    0 1 1 1 1 1 1 1 1 5 6
    0 1 1 2 2 3 3 4 4 5 6
    0 1 2 1 2 1 2 1 2 5 6"""
  table = np.array(want.split(), int).reshape(3, -1).T
  np.testing.assert_array_equal(got, table)


@pytest.fixture(scope="module")
def their_model():
  small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
  text = dict(num_hidden_layers=1, num_key_value_heads=2, head_dim=16, vocab_size=9)
  rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=5e6)
  vision = dict(num_heads=2, depth=1, out_hidden_size=32, deepstack_visual_indexes=[0])
  config = transformers.Qwen3VLConfig(
    text_config=dict(**small, **text, rope_parameters=rope),
    vision_config=dict(hidden_size=32, intermediate_size=32, **vision),
  )
  with torch.device("meta"):
    return transformers.Qwen3VLModel(config)


LONG = Visual(Grid(5, 6, 2), seconds=tuple(np.arange(10) / 2))
BLOCK = {VIDEO: "v" * 6, LONG: "v" * 3, IMAGE: "v" * 8}


@pytest.mark.parametrize(
  "visuals",
  [
    [],
    [VIDEO],
    [IMAGE],
    [VIDEO, LONG],
    [IMAGE, VIDEO, IMAGE],
    [LONG, IMAGE, IMAGE, VIDEO, LONG],
  ],
)
def test_positions_of_a_conversation_equal_transformers(their_model, visuals):
  text, kinds = "..", [0, 0]
  for visual in visuals:
    for _ in range(visual.grid.time):
      text += "." + BLOCK[visual] + "."
      kinds += [0] + [2 if visual.seconds else 1] * len(BLOCK[visual]) + [0]
    text, kinds = text + "...", [*kinds, 0, 0, 0]
  grids = {"image_grid_thw": [], "video_grid_thw": []}
  for visual in visuals:
    grids["video_grid_thw" if visual.seconds else "image_grid_thw"].append(visual.grid)
  grids = {name: torch.tensor(x) for name, x in grids.items() if x}
  kinds = torch.tensor([kinds])
  want, _ = their_model.get_rope_index(torch.ones_like(kinds), kinds, **grids)
  np.testing.assert_array_equal(positions_of(visuals, text), want[:, 0].T.numpy())


# transformers' processors.

VIDEOS = {  # Name -> (frames, height, width, settings).
  "same size": (4, 64, 96, {}),
  "larger": (4, 90, 75, {"min_pixels": 90_000}),
  "smaller": (6, 360, 640, {"max_pixels": 300_000}),
  "odd": (7, 200, 120, {"max_pixels": 100_000}),
  "tiny": (2, 20, 45, {}),
  "narrow": (5, 64, 500, {}),
  "limited frames": (4, 300, 400, {"max_frame_tokens": 20}),
}
IMAGES = {
  "small": (40, 70, {}),
  "large": (500, 700, {"max_image_pixels": 200_000}),
  "plain": (300, 333, {}),
}


def video_call(count, height, width, settings):
  ours = Qwen3VLProcessor(**settings)
  return Call(
    "Qwen3VLVideoProcessor",
    dict(
      size={"shortest_edge": ours.min_pixels, "longest_edge": ours.max_pixels},
      cap_pixels_per_frame=ours.max_frame_tokens > 0,
      max_video_tokens=ours.max_frame_tokens,
    ),
    dict(videos=[make_frames(count, height, width)], do_sample_frames=False),
  )


def image_call(height, width, settings):
  ours = Qwen3VLProcessor(**settings)
  limits = ours.min_image_pixels, ours.max_image_pixels
  return Call(
    "Qwen2VLImageProcessor",
    dict(
      size=dict(zip(("shortest_edge", "longest_edge"), limits, strict=True)),
      patch_size=16,
      image_mean=ours.mean,
      image_std=ours.std,
    ),
    dict(images=[make_frames(1, height, width)[0]]),
  )


def prompt_call():
  """A prompt with an image and a video, of which frames are sampled."""
  words = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
  letters = {letter: i for i, letter in enumerate("[]0123456789.<> seconds")}
  model = tokenizers.models.WordLevel(letters | {"[]": 99}, unk_token="[]")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  tokenizer.add_special_tokens(words)
  return Call(
    "Qwen3VLProcessor",
    dict(
      image_processor=image_call(64, 64, {})._replace(arguments={}),
      video_processor=video_call(2, 64, 64, {})._replace(arguments={}),
      tokenizer=Call("PreTrainedTokenizerFast", dict(tokenizer_object=tokenizer)),
    ),
    dict(
      text=[
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|>"
        "<|video_pad|><|vision_end|>"
      ],
      images=[make_frames(1, 64, 64)[0]],
      videos=[make_frames(33, 64, 96)],
      videos_kwargs=dict(video_metadata=[dict(total_num_frames=33, fps=12.0)]),
    ),
  )


@pytest.fixture(scope="module")
def theirs():
  """Name -> output of transformers; all in one process, which starts slowly."""
  calls = {name: video_call(*case) for name, case in VIDEOS.items()}
  calls |= {name: image_call(*case) for name, case in IMAGES.items()}
  calls["prompt"] = prompt_call()
  return dict(zip(calls, run_calls(list(calls.values())), strict=True))


@pytest.mark.torchvision
@pytest.mark.parametrize("name", VIDEOS)
def test_pixels_of_a_video_equal_transformers(theirs, name):
  count, height, width, settings = VIDEOS[name]
  processor = Qwen3VLProcessor(**settings)
  grid = processor.choose_grid(height, width, count)
  assert list(grid) == theirs[name]["video_grid_thw"][0].tolist()
  got = process(processor, make_frames(count, height, width))
  assert_pixels_close(got.pixels, theirs[name]["pixel_values_videos"], std=0.5)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_of_an_image_equal_transformers(theirs, name):
  height, width, settings = IMAGES[name]
  processor = Qwen3VLProcessor(**settings)
  grid = processor.choose_grid(height, width, None)
  assert list(grid) == theirs[name]["image_grid_thw"][0].tolist()
  got = process(processor, make_frames(1, height, width))
  assert_pixels_close(got.pixels, theirs[name]["pixel_values"], std=0.5)


@pytest.mark.torchvision
def test_frames_and_text_of_a_prompt_equal_transformers(theirs):
  out = theirs["prompt"]
  indices = DEFAULT.sample_frames(33, 12.0)
  video = Visual(DEFAULT.choose_grid(64, 96, len(indices)), tuple(indices / 12.0))
  assert list(video.grid) == out["video_grid_thw"][0].tolist()
  pixels = process(DEFAULT, make_frames(33, 64, 96)[indices]).pixels
  assert_pixels_close(pixels, out["pixel_values_videos"], std=0.5)
  image = Visual(DEFAULT.choose_grid(64, 64, None))
  text = [
    part if isinstance(part, str) else pad * part
    for visual, pad in ((image, "<|image_pad|>"), (video, "<|video_pad|>"))
    for part in DEFAULT.write_text(visual)
  ]
  tokenizer = prompt_call().settings["tokenizer"].settings["tokenizer_object"]
  assert tokenizer.encode("".join(text)).ids == out["input_ids"][0].tolist()
