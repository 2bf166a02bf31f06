"""Answers of a LLaVA-OneVision about clips equal those of transformers' generate."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.processors.clips import make_frames
from tests.helpers import chats, onevision
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import video
from vlmrlaif_jax.serving import chat_clip, chat_stream

CLIPS = {  # Name -> (frames, frames per second, height, width).
  "short": (6, 10, 64, 64),
  "wide": (33, 12, 60, 110),
  "long": (100, 25, 90, 70),
}
QUESTION = "What happens in the video?"
IMAGES = {"image.gif": (40, 91), "tall.gif": (60, 35)}  # Name -> height and width.
# Name -> the clips and images of a prompt; those of one are named as it is.
TALKS = {
  **{name: [name] for name in (*CLIPS, "image.gif")},
  "several": ["image.gif", "tall.gif"],
  "mixed": ["image.gif", "tall.gif", "short"],  # The template writes images first.
}
FRAMES = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(transformers' model, folder of the checkpoint and of the clips)."""
  folder = tmp_path_factory.mktemp("onevision")
  hf = onevision.write_checkpoint(folder, FRAMES)
  for name, clip in CLIPS.items():
    chats.write_squares(folder / f"{name}.mp4", *clip)
  for name, size in IMAGES.items():
    Image.fromarray(make_frames(1, *size)[0]).save(folder / name)
  return hf, folder


@pytest.fixture(scope="module")
def talk(made):
  return chats.open_model(made[1])


def their_prompt(made, names, template):
  """A call of transformers' processor with clips and images, and the question."""
  tokenizer = onevision.make_tokenizer(template)
  kinds = [{"type": "video" if name in CLIPS else "image"} for name in names]
  content = [*kinds, {"type": "text", "text": QUESTION}]
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
  )
  side = dict(height=onevision.IMAGE, width=onevision.IMAGE)
  settings = dict(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
  pinpoints = dict(image_grid_pinpoints=[list(x) for x in onevision.PINPOINTS])
  media = {}
  for name in names:
    if name not in CLIPS:
      pixels = np.asarray(Image.open(made[1] / name).convert("RGB"))
      media.setdefault("images", [[]])[0].append(pixels)
      continue
    count, rate, *_ = CLIPS[name]
    media["videos"] = [video.decode_video(made[1] / f"{name}.mp4", count)]
    metadata = dict(total_num_frames=count, fps=float(rate))
    media["videos_kwargs"] = dict(
      do_sample_frames=True, num_frames=FRAMES, video_metadata=[metadata]
    )
  backend = dict(tokenizer_object=tokenizer.backend_tokenizer)
  return Call(
    "LlavaOnevisionProcessor",
    dict(
      image_processor=Call("LlavaOnevisionImageProcessor", settings | pinpoints),
      video_processor=Call("LlavaOnevisionVideoProcessor", settings),
      tokenizer=Call("PreTrainedTokenizerFast", backend),
      num_image_tokens=onevision.SIDE**2,
      vision_feature_select_strategy="full",
    ),
    dict(text=[text], **media),
  )


@pytest.fixture(scope="module")
def prompts(made):
  """Name -> what the processor of transformers makes of a clip and the question."""
  calls = [their_prompt(made, names, onevision.TEMPLATE) for names in TALKS.values()]
  calls.append(their_prompt(made, ["short"], onevision.OLD_TEMPLATE))
  return dict(zip([*TALKS, "old"], run_calls(calls), strict=True))


def say(hf, given):
  """The greedy answer of transformers."""
  tokenizer = onevision.make_tokenizer()
  inputs = {key: torch.tensor(value) for key, value in given.items()}
  with torch.no_grad():
    out = hf.generate(
      **inputs, max_new_tokens=64, do_sample=False,
      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
  said = out[0, inputs["input_ids"].shape[1] :]
  return tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.torchvision
def test_the_command_prints_the_answer_of_transformers(made, prompts):
  hf, folder = made
  got = chats.run_command(folder, [folder / "wide.mp4"], QUESTION)
  assert got == say(hf, prompts["wide"])


def read(talk, folder, name):
  files = [folder / (f"{x}.mp4" if x in CLIPS else x) for x in TALKS[name]]
  return chat_clip.read_clips(talk, files, chat_clip.ClipLimits())


def assert_same_ids(batch, given):
  ids = np.asarray(batch.tokens)[np.asarray(batch.mask)]
  want, places = given["input_ids"][0], ids == VIDEO_TOKEN
  kinds = onevision.make_tokenizer().convert_tokens_to_ids(["<image>", "<video>"])
  assert np.isin(want[places], kinds).all() and len(want) == len(ids)
  np.testing.assert_array_equal(ids[~places], want[~places])


@pytest.mark.torchvision
@pytest.mark.parametrize("name", TALKS)
def test_greedy_answers_equal_transformers(made, talk, prompts, name):
  hf, folder = made
  clip, given = read(talk, folder, name), prompts[name]
  assert_same_ids(chat_stream._encode_conversation(talk, clip, (), QUESTION), given)
  request = chat_stream.ChatQuestion(QUESTION, max_tokens=64)
  *_, last = chat_stream.stream_side_by_side(talk, clip, {}, request)
  (answers,) = last.values()
  assert answers.texts[0] == say(hf, given)


@pytest.mark.torchvision
def test_older_template_has_the_ids_of_transformers(made, talk, prompts):
  tokenizer = onevision.make_tokenizer(onevision.OLD_TEMPLATE)
  old = talk._replace(run=talk.run._replace(tokenizer=tokenizer))
  clip = read(talk, made[1], "short")
  batch = chat_stream._encode_conversation(old, clip, (), QUESTION)
  assert_same_ids(batch, prompts["old"])
