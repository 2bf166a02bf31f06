import datetime
import fractions

import jax.numpy as jnp
import num2words
import numpy as np
import pytest
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from tests.data.processors.clips import assert_pixels_close, make_frames
from tests.helpers import smolvlm
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import templates, tokenization
from vlmrlaif_jax.data.processors.interface import (
  Grid,
  Visual,
  count_features,
  lay_out,
  make_positions,
  process_frames,
)
from vlmrlaif_jax.data.processors.smolvlm import SmolVLMProcessor, spell_number
from vlmrlaif_jax.data.video import Frames
from vlmrlaif_jax.models import clip

DEFAULT = SmolVLMProcessor()
TINY, _ = SmolVLMProcessor.from_config(
  smolvlm.PROCESSOR, smolvlm.PROCESSOR, smolvlm.their_config().to_dict()
)

# Configs.


def published(side, longest, patch, merge):
  """The config of a published image processor, and what matters of config.json."""
  sizes = {"max_image_size": {"longest_edge": side}, "size": {"longest_edge": longest}}
  sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": side}}
  image = {**smolvlm.PROCESSOR, **sizes, "video_sampling": sampling}
  vision = {"image_size": side, "patch_size": patch}
  return image, {"vision_config": vision, "scale_factor": merge}


def test_defaults_are_those_of_published_checkpoints():
  image, config = published(512, 2048, 16, 4)
  assert SmolVLMProcessor.from_config(image, image, config) == (DEFAULT, [])
  image, config = published(384, 1536, 14, 3)
  large, problems = SmolVLMProcessor.from_config(image, image, config)
  assert (large.side, large.longest, problems) == (384, 1536, [])
  clip_of_two = Visual(large.choose_grid(480, 640, 2), (0.0, 1.0), 1.0)
  assert count_features(lay_out(large, clip_of_two)) == 2 * 81


def test_settings_of_a_saved_video_processor_are_read():
  image, config = published(512, 2048, 16, 4)
  video = {"size": {"longest_edge": 1024}, "fps": 2, "num_frames": 32}
  got, problems = SmolVLMProcessor.from_config(image, video, config)
  assert (got, problems) == (
    SmolVLMProcessor(longest=1024, fps=2.0, max_frames=32),
    [],
  )


@pytest.mark.parametrize(
  "values, problem",
  [
    ({"resample": 3}, "resample of the image processor must be 1"),
    ({"do_normalize": False}, "do_normalize of the image processor must be True"),
    ({"max_image_size": {"longest_edge": 364}}, "max_image_size of the image"),
    ({"size": {"height": 64, "width": 64}}, "size.longest_edge of the image"),
    ({"size": {"longest_edge": 8192}}, "at most 4096, got 8192"),
    ({"crop_size": 3}, "crop_size=3 of the image processor is not supported"),
  ],
)
def test_unsupported_settings_are_named(values, problem):
  image, config = published(512, 2048, 16, 4)
  _, (first, *_) = SmolVLMProcessor.from_config({**image, **values}, image, config)
  assert problem in first


def test_other_means_of_videos_are_named():
  image, config = published(512, 2048, 16, 4)
  video = {**image, "image_mean": [0.4] * 3, "num_frames": 1000}
  del video["video_sampling"]
  _, problems = SmolVLMProcessor.from_config(image, video, config)
  assert "image_mean of the video processor" in problems[0]
  assert "max_frames of the video processor" in problems[1]


def test_limits_lower_the_number_of_frames():
  assert DEFAULT.limit() == DEFAULT
  assert DEFAULT.limit(fps=0.5, max_frames=8) == SmolVLMProcessor(fps=0.5, max_frames=8)
  assert DEFAULT.limit(max_pixels=5 * 512**2 + 1).max_frames == 5
  for name, value in (("max_pixels", 1), ("fps", -1.0), ("max_frames", 1000)):
    with pytest.raises(ValueError, match=f"{name}={value}"):
      DEFAULT.limit(**{name: value})


def test_greatest_layout_is_the_longest_video_or_an_image():
  assert DEFAULT.find_max_layout().grid == Grid(64, 32, 32)
  assert DEFAULT.limit(max_frames=8).find_max_layout() == Visual(Grid(1, 128, 128))
  one = SmolVLMProcessor(max_frames=1, split=False).find_max_layout()
  assert count_features(lay_out(DEFAULT, one)) == 64


# Frames.


@pytest.mark.parametrize("fps, most", [(1.0, 64), (2.0, 8), (0.5, 3)])
@pytest.mark.parametrize("rate", [24, fractions.Fraction(30_000, 1001), 25, 7])
def test_sampled_frames_equal_transformers(rate, fps, most):
  ours = SmolVLMProcessor(fps=fps, max_frames=most)
  rate = float(rate)
  for total in (1, 2, 11, 12, 13, 36, 60, 61, 250, 1599, 1700, 2000, 90_000):
    metadata = VideoMetadata(total, fps=rate, duration=total / rate)
    want = SmolVLMVideoProcessor.sample_frames(None, metadata, most, fps)
    np.testing.assert_array_equal(ours.sample_frames(total, rate), want)


def test_a_video_without_a_rate_has_24_frames_a_second():
  np.testing.assert_array_equal(
    DEFAULT.sample_frames(240, None), DEFAULT.sample_frames(240, 24.0)
  )


# Text and positions.


def test_numbers_are_spelled_like_num2words():
  numbers = range(1000)
  assert [*map(spell_number, numbers)] == [*map(num2words.num2words, numbers)]


def test_text_of_an_image_has_its_crops_and_the_whole_image():
  text = "".join(map(str, DEFAULT.write_text(Visual(Grid(1, 64, 96)))))
  rows = [
    "".join(f"<fake_token_around_image><row_{r}_col_{c}>64" for c in (1, 2, 3))
    for r in (1, 2)
  ]
  whole = "<fake_token_around_image><global-img>64<fake_token_around_image>"
  assert text == f"{rows[0]}\n{rows[1]}\n\n{whole}"
  single = SmolVLMProcessor(split=False)
  grid = single.choose_grid(480, 640, None)
  assert "".join(map(str, single.write_text(Visual(grid)))) == whole


def test_duration_is_that_of_the_video_or_the_last_time():
  times = tuple(float(i) for i in range(49))
  for seconds in (49.0, 50.5, 3700.0):
    text = DEFAULT.write_text(Visual(Grid(49, 32, 32), times, 49 / seconds))
    assert f"from a {datetime.timedelta(seconds=int(seconds))} [H:MM:SS]" in text[0]
  assert "from a 0:00:48 [" in DEFAULT.write_text(Visual(Grid(49, 32, 32), times))[0]


def test_positions_count_all_tokens():
  image, video = Visual(Grid(1, 8, 4)), Visual(Grid(2, 4, 4), (0.0, 1.0), 1.0)
  blocks = [block for x in (image, video) for block in TINY.list_blocks(x)]
  assert [len(block) for block in blocks] == [4] * 5
  has_feature = np.tile([False, True, True, True, True], 5)
  got = make_positions(has_feature, blocks, axes=TINY.axes)
  np.testing.assert_array_equal(got[:, 0], np.arange(25))


def test_one_frame_of_a_video_is_no_image():
  pixels, seconds = make_frames(1, 60, 90), np.zeros(1)
  _, layout = process_frames(TINY, Frames(pixels, seconds, pixels.shape[1:3], 0.8))
  assert layout == Visual(Grid(1, 4, 4), (0.0,), rate=0.8)
  _, layout = process_frames(TINY, Frames(pixels, seconds, pixels.shape[1:3]))
  assert layout == Visual(TINY.choose_grid(60, 90, None), size=(60, 90))


# transformers' processors.

VIDEOS = {  # Name -> (frames, height, width, frames per second).
  "wide": (35, 60, 90, 10.0),
  "tall": (70, 130, 75, 9.0),
  "second": (10, 33, 40, 10.0),
}
IMAGES = {"tall": (100, 70), "flat": (20, 300), "square": (64, 64), "small": (7, 9)}
QUESTION = "What happens in the video? 15 rings"
# The template writes a space before a text, but not before an image.
IMAGE_TEXT = f"<|im_start|>User:<image>{QUESTION}<end_of_utterance>\nAssistant:"


@pytest.fixture(scope="module")
def theirs():
  """Name -> output of transformers; all in one process, which starts slowly."""
  tokenizer = smolvlm.make_tokenizer()
  text = f"<|im_start|>User: <video>{QUESTION}<end_of_utterance>\nAssistant:"
  processor = dict(
    image_processor=Call("SmolVLMImageProcessor", smolvlm.PROCESSOR),
    video_processor=Call("SmolVLMVideoProcessor", smolvlm.PROCESSOR),
    tokenizer=Call(
      "PreTrainedTokenizerFast", dict(tokenizer_object=tokenizer.backend_tokenizer)
    ),
    image_seq_len=smolvlm.TOKENS,
  )
  calls = {}
  for name, (count, height, width, rate) in VIDEOS.items():
    metadata = dict(total_num_frames=count, fps=rate, duration=count / rate)
    inputs = dict(text=[text], videos=[make_frames(count, height, width)])
    sampling = dict(do_sample_frames=True, video_metadata=[metadata])
    calls[name, "video"] = Call(
      "SmolVLMProcessor", processor, dict(**inputs, videos_kwargs=sampling)
    )
  for name, size in IMAGES.items():
    calls[name, "image"] = Call(
      "SmolVLMProcessor",
      processor,
      dict(text=[IMAGE_TEXT], images=[make_frames(1, *size)[0]]),
    )
  return dict(zip(calls, run_calls(list(calls.values())), strict=True))


def cut(pixels):
  """The patches of squares of transformers."""
  channels_last = jnp.moveaxis(pixels, 1, -1)
  return np.concatenate(clip.cut_patches(channels_last, smolvlm.SIDE, TINY.patch))


def read(name):
  """(frames that are read, layout) of a video."""
  count, height, width, rate = VIDEOS[name]
  numbers = TINY.sample_frames(count, rate)
  grid = TINY.choose_grid(height, width, len(numbers))
  seconds = tuple((numbers / rate).tolist())
  layout = Visual(grid, seconds, len(numbers) * rate / count)
  return make_frames(count, height, width)[numbers], layout


@pytest.mark.torchvision
@pytest.mark.parametrize("name", VIDEOS)
def test_pixels_of_a_video_equal_transformers(theirs, name):
  frames, layout = read(name)
  frames = np.stack([TINY.resize(frame, len(frames)) for frame in frames])
  got = TINY.process(frames, layout.grid)
  want = cut(theirs[name, "video"]["pixel_values"][0])
  assert_pixels_close(got.pixels, want, 0.5)


def encode(layout):
  """The ids of the prompt with a video or an image, as transformers writes them."""
  tokenizer = smolvlm.make_tokenizer()
  encoded = tokenization.encode_conversation(
    tokenizer,
    templates.get_template("chat_template"),
    [(QUESTION, None)],
    video=lay_out(TINY, layout),
  )
  np.testing.assert_array_equal(encoded.positions[:, 0], np.arange(len(encoded.ids)))
  image = tokenizer.convert_tokens_to_ids(smolvlm.IMAGE)
  return [image if i == VIDEO_TOKEN else i for i in encoded.ids]


@pytest.mark.torchvision
@pytest.mark.parametrize("name", VIDEOS)
def test_prompt_with_a_video_equals_transformers(theirs, name):
  got = encode(read(name)[1])
  assert got == theirs[name, "video"]["input_ids"][0].tolist()


@pytest.mark.torchvision
@pytest.mark.parametrize("name", IMAGES)
def test_crops_and_prompt_of_an_image_equal_transformers(theirs, name):
  want = theirs[name, "image"]
  grid = TINY.choose_grid(*IMAGES[name], None)
  got = TINY.process(make_frames(1, *IMAGES[name]), grid)
  assert_pixels_close(got.pixels, cut(want["pixel_values"][0]), 0.5)
  assert encode(Visual(grid)) == want["input_ids"][0].tolist()
