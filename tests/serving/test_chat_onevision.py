"""Answers of a LLaVA-OneVision about clips equal those of transformers' generate."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.processors.clips import make_frames
from tests.helpers import chats, onevision
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import video
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.serving import chat_clip, chat_session, chat_stream

CLIPS = {  # Name -> (frames, frames per second, height, width).
  "short": (6, 10, 64, 64),
  "wide": (33, 12, 60, 110),
  "long": (100, 25, 90, 70),
}
ROOT = pathlib.Path(__file__).parents[2]
QUESTION = "What happens in the video?"
FRAMES = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(transformers' model, folder of the checkpoint and of the clips)."""
  folder = tmp_path_factory.mktemp("onevision")
  hf = onevision.write_checkpoint(folder, FRAMES)
  for name, clip in CLIPS.items():
    chats.write_squares(folder / f"{name}.mp4", *clip)
  Image.fromarray(make_frames(1, 40, 91)[0]).save(folder / "image.gif")
  return hf, folder


@pytest.fixture(scope="module")
def talk(made):
  model = run_lib.default_config()
  model.update(
    template="", prompts="brief", frames=8, clip_frames=8, lora_rank=0, lora_alpha=1.0
  )
  return chat_session.open_model(
    str(made[1]), model, chats.mesh(), max_prompt=4096, note=lambda line: None
  )


def their_prompt(made, name, template):
  """A call of transformers' processor with a clip, or an image, and the question."""
  tokenizer = onevision.make_tokenizer(template)
  kind = "video" if name in CLIPS else "image"
  content = [{"type": kind}, {"type": "text", "text": QUESTION}]
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
  )
  side = dict(height=onevision.IMAGE, width=onevision.IMAGE)
  settings = dict(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
  pinpoints = dict(image_grid_pinpoints=[list(x) for x in onevision.PINPOINTS])
  if kind == "video":
    count, rate, *_ = CLIPS[name]
    frames = video.decode_video(made[1] / f"{name}.mp4", count)
    metadata = dict(total_num_frames=count, fps=float(rate))
    sampling = dict(do_sample_frames=True, num_frames=FRAMES, video_metadata=[metadata])
    media = dict(videos=[frames], videos_kwargs=sampling)
  else:
    media = dict(images=[np.asarray(Image.open(made[1] / name).convert("RGB"))])
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
  names = [*CLIPS, "image.gif"]
  calls = [their_prompt(made, name, onevision.TEMPLATE) for name in names]
  calls.append(their_prompt(made, "short", onevision.OLD_TEMPLATE))
  return dict(zip([*names, "old"], run_calls(calls), strict=True))


def say(hf, given):
  """The greedy answer of transformers."""
  tokenizer = onevision.make_tokenizer()
  inputs = {key: torch.tensor(value) for key, value in given.items()}
  inputs.pop("batch_num_images", None)
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
  process = subprocess.run(
    [sys.executable, "launch/chat.py", f"--model={folder}",
     f"--video={folder / 'wide.mp4'}", f"--prompt={QUESTION}", "--temperature=0",
     "--max_tokens=64", "--dtype=float32"],
    cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
    text=True,
  )  # fmt: skip
  assert process.returncode == 0, process.stderr[-3000:]
  assert process.stdout.strip() == f"{folder.name}: {say(hf, prompts['wide'])}".strip()


def read(talk, folder, name):
  file = name if "." in name else f"{name}.mp4"
  return chat_clip.read_clip(talk, folder / file, chat_clip.ClipLimits())


def assert_same_ids(batch, given):
  ids = np.asarray(batch.tokens)[np.asarray(batch.mask)]
  want, places = given["input_ids"][0], ids == VIDEO_TOKEN
  kinds = onevision.make_tokenizer().convert_tokens_to_ids(["<image>", "<video>"])
  assert np.isin(want[places], kinds).all() and len(want) == len(ids)
  np.testing.assert_array_equal(ids[~places], want[~places])


@pytest.mark.torchvision
@pytest.mark.parametrize("name", [*CLIPS, "image.gif"])
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
