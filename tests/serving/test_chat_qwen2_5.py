"""Answers of a Qwen2.5-VL about clips equal those of transformers.

They are compared with a loop over the forward pass of transformers, whose `generate`
counts other positions after a video; see helpers/qwen2_5.py.
"""

import numpy as np
import pytest

from tests.data.processors.clips import assert_pixels_close
from tests.helpers import chats, qwen, qwen2_5
from tests.helpers.processor_oracle import Call, run_calls
from tests.serving.test_chat_qwen3 import CLIPS, QUESTION
from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.processors.interface import process_frames
from vlmrlaif_jax.serving import chat_clip, chat_stream

MAX_NEW = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(transformers' model, folder of the clips and of the published checkpoint)."""
  root = tmp_path_factory.mktemp("qwen2_5")
  hf = qwen2_5.write_checkpoint(root / "new")
  folder = qwen2_5.write_published(root / "published", root / "new")
  for name, clip in CLIPS.items():
    chats.write_squares(folder / f"{name}.mp4", *clip)
  return hf, folder


@pytest.fixture(scope="module")
def talk(made):
  return chats.open_model(made[1], grids="exact")


@pytest.fixture(scope="module")
def prompts(made):
  """Name -> what the processor of transformers makes of a clip and the question."""
  tokenizer, calls = qwen.make_tokenizer(), []
  content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
  )
  colors = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
  settings = dict(size=qwen2_5.PIXELS, patch_size=4, **colors)
  for name, (count, rate, *_) in CLIPS.items():
    frames = video.decode_video(made[1] / f"{name}.mp4", count)
    metadata = dict(total_num_frames=count, fps=float(rate))
    calls.append(Call(
      "Qwen2_5_VLProcessor",
      dict(
        image_processor=Call("Qwen2VLImageProcessor", settings),
        video_processor=Call(
          "Qwen2VLVideoProcessor", dict(cap_pixels_per_frame=False, **settings)
        ),
        tokenizer=Call("PreTrainedTokenizerFast",
                       dict(tokenizer_object=tokenizer.backend_tokenizer)),
      ),
      dict(text=[text], videos=[frames],
           videos_kwargs=dict(
             video_metadata=[metadata], do_sample_frames=True, fps=2.0)),
    ))  # fmt: skip
  return dict(zip(CLIPS, run_calls(calls), strict=True))


def say(hf, given):
  """The greedy answer of transformers."""
  tokenizer = qwen.make_tokenizer()
  said = qwen2_5.say(hf, given, MAX_NEW, tokenizer.eos_token_id)
  return tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.torchvision
def test_the_command_prints_the_answer_of_transformers(made, prompts):
  hf, folder = made
  got = chats.run_command(folder, [folder / "wide.mp4"], QUESTION, max_new=MAX_NEW)
  assert got == say(hf, prompts["wide"])


@pytest.mark.torchvision
@pytest.mark.parametrize("name", CLIPS)
def test_greedy_answers_equal_transformers(made, talk, prompts, name):
  hf, folder = made
  tokenizer, given = qwen.make_tokenizer(), prompts[name]
  clip = chat_clip.read_clips(talk, [folder / f"{name}.mp4"], chat_clip.ClipLimits())
  assert list(clip.layouts[0].grid) == given["video_grid_thw"][0].tolist()
  assert 2 / clip.layouts[0].rate == pytest.approx(
    float(given["second_per_grid_ts"][0])
  )
  batch = chat_stream._encode_conversation(talk, clip, (), QUESTION)
  ids = batch.tokens[batch.mask]
  pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
  np.testing.assert_array_equal(np.where(ids < 0, pad, ids), given["input_ids"][0])
  request = chat_stream.ChatQuestion(QUESTION, max_tokens=MAX_NEW)
  *_, last = chat_stream.stream_side_by_side(talk, clip, {}, request)
  (answers,) = last.values()
  assert len(answers.texts[0]) > 9  # Or a model that says nothing would pass.
  # Pixels differ by rounding, which decides between tokens of nearly equal logits.
  reading = talk.run.processor.make_reading("pyav")
  frames = video.read_video(folder / f"{name}.mp4", reading)
  pixels = process_frames(talk.run.processor, frames)[0].pixels
  assert_pixels_close(pixels, given["pixel_values_videos"], 0.5)
  assert answers.texts[0] == say(hf, given | {"pixel_values_videos": pixels})
