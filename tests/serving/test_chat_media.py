"""Answers of a Qwen3-VL about clips and images equal those of transformers."""

import functools

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import chats, qwen
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.data.processors.interface import lay_out
from vlmrlaif_jax.data.templates import MEDIA_MARK
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.sampling.generate import generate
from vlmrlaif_jax.serving import chat_clip, chat_stream

CLIPS = {  # Name -> (frames, rate, height, width).
  "short": (10, 10, 64, 64),
  "wide": (33, 12, 60, 110),
  "long": (100, 25, 90, 70),
}
QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(transformers' model, folder of the checkpoint and of the clips)."""
  folder = tmp_path_factory.mktemp("qwen")
  hf = qwen.write_checkpoint(folder)
  for name, clip in CLIPS.items():
    chats.write_squares(folder / f"{name}.mp4", *clip)
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  Image.fromarray(pixels.repeat(15, 0).repeat(15, 1)).save(folder / "image.png")
  return hf, folder


@pytest.fixture(scope="module")
def talk(made):
  return chats.open_model(made[1], grids="exact")


# Name -> the contents of the turns of a conversation, of which the last is open.
TALKS = {
  **{name: [[name, QUESTION]] for name in CLIPS},
  "several": [["wide", "image", "short", QUESTION]],
  "turns": [["short", "long", "What happens?"], ["A ring."],
            ["Is it in ", "image", " too?"]],
}  # fmt: skip


def write_turns(contents):
  """(question, answer) pairs, with marks where clips do not precede the first one."""
  texts = [
    "".join(MEDIA_MARK if x in (*CLIPS, "image") else x for x in content)
    for content in contents
  ]
  if MEDIA_MARK not in texts[-1]:
    return [(texts[0].lstrip(MEDIA_MARK), None)]
  return list(zip(texts[::2], [*texts[1::2], None], strict=True))


def list_files(folder, contents):
  names = [name for content in contents for name in content]
  return [folder / (f"{x}.mp4" if x in CLIPS else "image.png")
          for x in names if x in (*CLIPS, "image")]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(made):
  """Name -> what the processor of transformers makes of a conversation."""
  tokenizer = qwen.make_tokenizer()
  settings = dict(
    size=qwen.PIXELS, patch_size=4, image_mean=[0.5] * 3, image_std=[0.5] * 3
  )
  parts = dict(
    image_processor=Call("Qwen2VLImageProcessor", settings),
    video_processor=Call("Qwen3VLVideoProcessor", settings),
    tokenizer=Call("PreTrainedTokenizerFast",
                   dict(tokenizer_object=tokenizer.backend_tokenizer)),
  )  # fmt: skip
  calls = []
  for contents in TALKS.values():
    messages = [
      {"role": role, "content": [
        {"type": "video" if x in CLIPS else x} if x in (*CLIPS, "image")
        else {"type": "text", "text": x} for x in content]}
      for role, content in zip(("user", "assistant") * 2, contents, strict=False)
    ]  # fmt: skip
    names = [x for content in contents for x in content if x in CLIPS]
    given = dict(
      text=[tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True)],
      videos=[video.decode_video(made[1] / f"{x}.mp4", CLIPS[x][0]) for x in names],
      videos_kwargs=dict(video_metadata=[
        dict(total_num_frames=CLIPS[x][0], fps=float(CLIPS[x][1])) for x in names]),
    )  # fmt: skip
    if any("image" in content for content in contents):
      given["images"] = [np.asarray(Image.open(made[1] / "image.png"))]
    calls.append(Call("Qwen3VLProcessor", parts, given))
  return dict(zip(TALKS, run_calls(calls), strict=True))


def say(hf, given, length=64):
  """The greedy answer of transformers."""
  tokenizer = qwen.make_tokenizer()
  inputs = {key: torch.tensor(value) for key, value in given.items()}
  with torch.no_grad():
    out = hf.generate(
      **inputs, max_new_tokens=length, do_sample=False,
      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
  said = out[0, inputs["input_ids"].shape[1] :]
  return tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.torchvision
def test_the_command_prints_the_answer_of_transformers(made, prompts):
  hf, folder = made
  got = chats.run_command(folder, list_files(folder, TALKS["several"]), QUESTION)
  assert got == say(hf, prompts["several"])


def read_clips(talk, folder, contents):
  return chat_clip.read_clips(
    talk, list_files(folder, contents), chat_clip.ClipLimits()
  )


@pytest.mark.torchvision
@pytest.mark.parametrize("name", TALKS)
def test_greedy_answers_equal_transformers(made, talk, prompts, name):
  hf, folder = made
  tokenizer, given = qwen.make_tokenizer(), prompts[name]
  clip = read_clips(talk, folder, TALKS[name])
  *history, (question, _) = write_turns(TALKS[name])
  batch = chat_stream._encode_conversation(talk, clip, history, question)
  ids = batch.tokens[batch.mask]
  want = given["input_ids"][0]
  pads = tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|image_pad|>"])
  np.testing.assert_array_equal(ids, np.where(np.isin(want, pads), VIDEO_TOKEN, want))
  request = chat_stream.ChatQuestion(question, max_tokens=64)
  *_, last = chat_stream.stream_answer(talk, folder.name, clip, history, request)
  assert last.texts[0] == say(hf, given)


@pytest.mark.torchvision
def test_a_batch_of_conversations_has_the_answers_of_transformers(made, talk, prompts):
  """Rows with different numbers of clips, whose features are padded to one length."""
  hf, folder = made
  run, names = talk.run, ("turns", "short", "several")
  clips = [read_clips(talk, folder, TALKS[name]) for name in names]
  rows = [
    answering.encode_prompt(
      run, write_turns(TALKS[name]), lay_out(run.processor, *clip.layouts)
    )
    for name, clip in zip(names, clips, strict=True)
  ]
  longest = max(len(row.ids) for row in rows)
  padded = tokenization.pad_rows(
    rows, prompt_len=longest + 3, response_len=0, pad=run.tokenizer.pad_token_id
  )
  length = max(len(clip.features) for clip in clips) + 2
  features = np.full((3, length, clips[0].features.shape[-1]), 7.0, np.float32)
  for row, clip in zip(features, clips, strict=True):
    row[: len(clip.features)] = clip.features
  settings = dict(max_new=48, temperature=0.0, top_p=1.0, top_k=0)
  ids = answering.get_token_ids(run) | {"vocab": run.policy.llm.vocab}
  sample = jax.jit(functools.partial(generate, run.policy, **settings, **ids))
  sampled = sample(run.base, Batch(features, *padded), jax.random.key(0))
  tokens, mask = sampled.batch.tokens, sampled.batch.loss_mask
  texts = tokenization.decode_responses(
    run.tokenizer, np.asarray(tokens), np.asarray(mask)
  )
  assert texts == [say(hf, prompts[name], length=48) for name in names]
