import numpy as np
import pytest

from tests.data.processors.clips import assert_pixels_close, make_frames
from tests.helpers import onevision
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.data.processors.interface import (
  Grid,
  Visual,
  count_features,
  lay_out,
  process_frames,
)
from vlmrlaif_jax.data.processors.llava_onevision import LlavaOnevisionProcessor
from vlmrlaif_jax.data.video import Frames

DEFAULT, SMALL = LlavaOnevisionProcessor(), onevision.PROCESSOR

# Configs. Those of published checkpoints, as far as they say something.

IMAGE = {
  "size": {"height": 384, "width": 384},
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
  "image_grid_pinpoints": [list(pair) for pair in DEFAULT.pinpoints],
  "do_pad": True,
  "resample": 3,
  "rescale_factor": 1 / 255,
  "image_processor_type": "LlavaOnevisionImageProcessor",
  "processor_class": "LlavaOnevisionProcessor",
}
VIDEO = {key: x for key, x in IMAGE.items() if key not in ("do_pad",)}
CONFIG = {
  "image_grid_pinpoints": IMAGE["image_grid_pinpoints"],
  "vision_aspect_ratio": "anyres_max_9",
  "vision_config": {"image_size": 384, "patch_size": 14},
  "text_config": {"hidden_size": 896},
}


def test_defaults_are_those_of_published_checkpoints():
  got = LlavaOnevisionProcessor.from_config(IMAGE, VIDEO, CONFIG)
  assert got == (DEFAULT, [])


def test_settings_are_read_from_configs():
  video = {**VIDEO, "num_frames": 8, "image_mean": [0.1, 0.2, 0.3]}
  config = {
    **CONFIG,
    "vision_aspect_ratio": "anyres_max_4",
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "average",
  }
  got, problems = LlavaOnevisionProcessor.from_config(IMAGE, video, config)
  want = LlavaOnevisionProcessor(
    frames=8, mean=(0.1, 0.2, 0.3), max_crops=4, newline="grid", pool="average"
  )
  assert (got, problems) == (want, [])


@pytest.mark.parametrize(
  "image, video, config, reason",
  [
    ({"size": {"shortest_edge": 384}}, {}, {}, "size of the image processor"),
    ({}, {"do_center_crop": True}, {}, "do_center_crop=True of the video"),
    ({}, {"resample": 2}, {}, "resample of the video processor must be 3"),
    ({"image_grid_pinpoints": [[384, 384]]}, {}, {}, "image_grid_pinpoints differ"),
    ({}, {"fps": 2}, {}, "fps=2 of the video processor"),
    ({}, {}, {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio must be"),
  ],
)
def test_what_is_not_supported_is_named(image, video, config, reason):
  _, problems = LlavaOnevisionProcessor.from_config(
    {**IMAGE, **image}, {**VIDEO, **video}, {**CONFIG, **config}
  )
  (problem,) = problems
  assert problem.startswith(reason)


# Limits.


def test_limits_reduce_the_frames():
  limited = DEFAULT.limit(fps=0.5, max_frames=10, max_pixels=4 * 384**2)
  assert (limited.frames, limited.rate) == (4, 0.5)
  assert DEFAULT.limit() == DEFAULT
  assert DEFAULT.limit(max_frames=64).frames == 32
  assert limited.find_max_layout().grid == Grid(4, 14, 14)


@pytest.mark.parametrize("limits", [dict(fps=-1.0), dict(max_pixels=1000)])
def test_impossible_limits_are_refused(limits):
  with pytest.raises(ValueError, match="Set"):
    DEFAULT.limit(**limits)


# Frames and text.


@pytest.mark.parametrize(
  "total, rate, fps, want",
  [
    (8, 8.0, 0.0, [0, 2, 4, 6]),
    (10, 8.0, 0.0, [0, 2, 5, 7]),
    (3, 8.0, 0.0, [0, 1, 2]),  # All, where transformers stops.
    (30, 10.0, 1.0, [0, 10, 20]),  # 1 of each of 3 seconds.
    (5, 10.0, 1.0, [0]),
    (50, None, 1.0, [0, 12, 25, 37]),
  ],
)
def test_frames_are_the_first_of_equal_parts(total, rate, fps, want):
  processor = LlavaOnevisionProcessor(frames=4, rate=fps)
  assert processor.sample_frames(total, rate).tolist() == want


def test_layout_of_an_image_has_its_size():
  frames = Frames(make_frames(1, 50, 90), np.zeros(1), (50, 90))
  _, layout = process_frames(SMALL, frames)
  assert layout == Visual(Grid(2 + 15, 5, 5), size=(50, 90))
  video = Frames(make_frames(3, 50, 90), np.arange(3.0), (50, 90), 1.0)
  _, layout = process_frames(SMALL, video)
  assert layout == Visual(Grid(3, 3, 3), (0.0, 1.0, 2.0), 1.0)


def test_clip_of_a_video_ends_with_one_newline():
  visual = Visual(Grid(5, 3, 3), tuple(map(float, range(5)))).select(1, 3)
  features = np.arange(5 * 10)[:, None].reshape(5, 10, 1).astype(np.float32)
  got = SMALL.arrange(features[1:3], visual)[:, 0]
  assert got.tolist() == [*range(10, 19), *range(20, 29), 29]
  assert SMALL.write_text(visual) == [19, "\n"]
  assert len(SMALL.list_blocks(visual)[0]) == 19


def test_text_of_a_llava_video_has_the_times_of_its_frames():
  config = {**CONFIG, "mm_newline_position": "grid", "add_time_instruction": True}
  processor, problems = LlavaOnevisionProcessor.from_config(IMAGE, VIDEO, config)
  video = Visual(Grid(3, 14, 14), (0.0, 2.004, 4.0), rate=0.5)
  assert not problems and processor.write_text(video) == [
    3 * 14 * 15,
    "\nThe video lasts for 6.00 seconds, and 3 frames are uniformly sampled from it. "
    "These frames are located at 0.00s,2.00s,4.00s.Please answer the following "
    "questions related to this video.\n",
  ]
  image = Visual(processor.choose_grid(384, 384, None), size=(384, 384))
  assert processor.write_text(image)[1] == "\n"


# transformers' processors.

VIDEOS = {  # Name -> (frames, height, width, processor).
  "published": (2, 100, 150, DEFAULT),
  "wide": (3, 18, 90, SMALL),
}
IMAGES = {  # Name -> (height, width, processor).
  "published": (100, 150, DEFAULT),
  "square": (22, 22, SMALL),
  "wide": (40, 91, SMALL),
  "tall": (100, 31, SMALL),
  "large": (130, 132, SMALL),
}


SEVERAL = ((40, 91), (100, 31), (22, 22))


def size_of(processor):
  side = processor.image
  return dict(
    size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
  )


def image_call(processor, *sizes):
  settings = dict(
    **size_of(processor), image_grid_pinpoints=[list(x) for x in processor.pinpoints]
  )
  tokenizer = dict(tokenizer_object=onevision.make_tokenizer().backend_tokenizer)
  return Call(
    "LlavaOnevisionProcessor",
    dict(
      image_processor=Call("LlavaOnevisionImageProcessor", settings),
      video_processor=Call("LlavaOnevisionVideoProcessor", size_of(processor)),
      tokenizer=Call("PreTrainedTokenizerFast", tokenizer),
      num_image_tokens=processor.side**2,
      vision_feature_select_strategy="full",
    ),
    dict(
      text=["<image>" * len(sizes)],
      images=[[make_frames(1, *size)[0] for size in sizes]],
    ),
  )


@pytest.fixture(scope="module")
def theirs():
  """Name -> output of transformers; all in one process, which starts slowly."""
  calls = {
    ("video", name): Call(
      "LlavaOnevisionVideoProcessor",
      size_of(processor),
      dict(videos=[make_frames(count, height, width)]),
    )
    for name, (count, height, width, processor) in VIDEOS.items()
  }
  calls |= {
    ("image", name): image_call(processor, size)
    for name, (*size, processor) in IMAGES.items()
  }
  calls["several"] = image_call(SMALL, *SEVERAL)
  calls["sampled"] = Call(
    "LlavaOnevisionVideoProcessor",
    size_of(SMALL),
    dict(
      videos=[make_frames(35, 22, 22)],
      do_sample_frames=True,
      num_frames=8,
      video_metadata=[dict(total_num_frames=35, fps=10.0)],
    ),
  )
  return dict(zip(calls, run_calls(list(calls.values())), strict=True))


def assert_equal_pixels(processor, got, want):
  """Compares patches with squares of transformers, [squares, 3, height, width]."""
  side = processor.side * processor.patch
  squares = np.moveaxis(want, 1, -1)[:, :side, :side]
  patches = onevision.cut_square_patches(squares, processor.patch)
  assert_pixels_close(got, patches, 0.5)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", VIDEOS)
def test_pixels_of_a_video_equal_transformers(theirs, name):
  count, height, width, processor = VIDEOS[name]
  grid = processor.choose_grid(height, width, count)
  got = processor.process(make_frames(count, height, width), grid)
  want = theirs["video", name]["pixel_values_videos"][0]
  assert_equal_pixels(processor, got.pixels, want)


@pytest.mark.torchvision
def test_sampled_frames_equal_transformers(theirs):
  processor = LlavaOnevisionProcessor(image=22, patch=4, frames=8)
  frames = make_frames(35, 22, 22)[processor.sample_frames(35, 10.0)]
  got = processor.process(frames, processor.choose_grid(22, 22, 8))
  want = theirs["sampled"]["pixel_values_videos"][0]
  assert_equal_pixels(processor, got.pixels, want)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_and_tokens_of_an_image_equal_transformers(theirs, name):
  height, width, processor = IMAGES[name]
  want = theirs["image", name]
  frames = Frames(make_frames(1, height, width), np.zeros(1), (height, width))
  got, layout = process_frames(processor, frames)
  assert layout.grid.time == len(want["pixel_values"][0]) + 1
  assert processor.write_text(layout)[0] == want["input_ids"].size
  crops = got.pixels[: -(processor.side**2)]
  assert_equal_pixels(processor, crops, want["pixel_values"][0])


@pytest.mark.torchvision
def test_pixels_and_tokens_of_several_images_equal_transformers(theirs):
  want = theirs["several"]
  frames = [Frames(make_frames(1, *x), np.zeros(1), x) for x in SEVERAL]
  made = [process_frames(SMALL, each) for each in frames]
  for (got, _), pixels in zip(made, want["pixel_values"], strict=True):
    assert_equal_pixels(SMALL, got.pixels[-(SMALL.side**2) :], pixels)
  tokens = lay_out(SMALL, *(layout for _, layout in made))
  assert count_features(tokens) == want["input_ids"].size == 3 * 26
