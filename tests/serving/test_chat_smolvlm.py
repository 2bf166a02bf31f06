"""Answers of a SmolVLM2 about clips equal those of transformers' generate."""

import numpy as np
import pytest
import torch
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from tests.helpers import chats, smolvlm
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import video
from vlmrlaif_jax.serving import chat_clip, chat_stream

CLIPS = {  # Name -> (frames, frames per second, height, width).
  "second": (12, 10, 64, 50),  # One frame is read, which is no image.
  "tall": (77, 13, 50, 98),
  "minutes": (900, 12, 36, 64),  # No frame of the first and the last second is read.
}
QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(transformers' model, folder of the checkpoint and of the clips)."""
  folder = tmp_path_factory.mktemp("smolvlm")
  hf = smolvlm.write_checkpoint(folder)
  for name, clip in CLIPS.items():
    chats.write_squares(folder / f"{name}.mp4", *clip)
  return hf, folder


@pytest.fixture(scope="module")
def theirs(made):
  """Name -> what the processor of transformers makes of a clip and the question."""
  tokenizer, calls = smolvlm.make_tokenizer(), []
  content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], chat_template=DEFAULT_CHAT_TEMPLATE,
    tokenize=False, add_generation_prompt=True,
  )  # fmt: skip
  processor = dict(
    image_processor=Call("SmolVLMImageProcessor", smolvlm.PROCESSOR),
    video_processor=Call("SmolVLMVideoProcessor", smolvlm.PROCESSOR),
    tokenizer=Call(
      "PreTrainedTokenizerFast", dict(tokenizer_object=tokenizer.backend_tokenizer)
    ),
    image_seq_len=smolvlm.TOKENS,
  )
  for name, (count, rate, *_) in CLIPS.items():
    frames = video.decode_video(made[1] / f"{name}.mp4", count)
    metadata = dict(total_num_frames=count, fps=float(rate), duration=count / rate)
    sampling = dict(do_sample_frames=True, video_metadata=[metadata])
    inputs = dict(text=[text], videos=[frames], videos_kwargs=sampling)
    calls.append(Call("SmolVLMProcessor", processor, inputs))
  return dict(zip(CLIPS, run_calls(calls), strict=True))


def say(hf, given):
  """The greedy answer of transformers."""
  names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
  inputs = {name: torch.tensor(given[name]) for name in names}
  with torch.no_grad():
    out = hf.generate(**inputs, max_new_tokens=64, do_sample=False)
  said = out[0, inputs["input_ids"].shape[1] :]
  return smolvlm.make_tokenizer().decode(said, skip_special_tokens=True).strip()


@pytest.mark.torchvision
def test_the_command_prints_the_answer_of_transformers(made, theirs):
  hf, folder = made
  got = chats.run_command(folder, [folder / "tall.mp4"], QUESTION)
  assert got == say(hf, theirs["tall"])


@pytest.mark.torchvision
def test_greedy_answers_equal_transformers(made, theirs):
  hf, folder = made
  talk = chats.open_model(folder)
  image = smolvlm.make_tokenizer().convert_tokens_to_ids(smolvlm.IMAGE)
  for name, given in theirs.items():
    clip = chat_clip.read_clips(talk, [folder / f"{name}.mp4"], chat_clip.ClipLimits())
    batch = chat_stream._encode_conversation(talk, clip, (), QUESTION)
    ids = batch.tokens[batch.mask]
    got = np.where(ids == VIDEO_TOKEN, image, ids)
    np.testing.assert_array_equal(got, given["input_ids"][0])
    request = chat_stream.ChatQuestion(QUESTION, max_tokens=64)
    *_, last = chat_stream.stream_side_by_side(talk, clip, {}, request)
    (answers,) = last.values()
    assert answers.texts[0] == say(hf, given), name
