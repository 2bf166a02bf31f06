"""Answers of a Qwen3-VL about clips equal those of transformers' generate."""

import numpy as np
import pytest
import torch

from tests.helpers import chats, qwen
from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.data import video
from vlmrlaif_jax.serving import chat_clip, chat_stream

CLIPS = {  # Name -> (frames, rate, height, width).
  "short": (10, 10, 64, 64),
  "wide": (33, 12, 60, 110),
  "long": (100, 25, 90, 70),
}
QUESTION = "What happens in the video?"
LIMITS = dict(fps=1.5, max_frames=3, max_pixels=3000)  # Of the command.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(transformers' model, folder of the checkpoint and of the clips)."""
  folder = tmp_path_factory.mktemp("qwen")
  hf = qwen.write_checkpoint(folder)
  for name, clip in CLIPS.items():
    chats.write_squares(folder / f"{name}.mp4", *clip)
  return hf, folder


@pytest.fixture(scope="module")
def talk(made):
  return chats.open_model(made[1], grids="exact")


def answer(talk, video):
  """(the clip, our greedy answer)."""
  clip = chat_clip.read_clips(talk, [video], chat_clip.ClipLimits())
  request = chat_stream.ChatQuestion(QUESTION, max_tokens=64)
  *_, last = chat_stream.stream_side_by_side(talk, clip, {}, request)
  (answers,) = last.values()
  return clip, answers


@pytest.fixture(scope="module")
def prompts(made):
  """Name -> what the processor of transformers makes of a clip and the question."""
  tokenizer, calls = qwen.make_tokenizer(), []
  content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
  )
  plain = dict(size=qwen.PIXELS, patch_size=4)
  size = {"shortest_edge": 256, "longest_edge": LIMITS["max_pixels"]}
  limited = plain | dict(size=size, fps=LIMITS["fps"], max_frames=LIMITS["max_frames"])
  cases = {name: (name, plain) for name in CLIPS} | {"limited": ("wide", limited)}
  for name, settings in cases.values():
    count, rate, *_ = CLIPS[name]
    frames = video.decode_video(made[1] / f"{name}.mp4", count)
    metadata = dict(total_num_frames=count, fps=float(rate))
    calls.append(Call(
      "Qwen3VLProcessor",
      dict(
        image_processor=Call("Qwen2VLImageProcessor", plain),
        video_processor=Call("Qwen3VLVideoProcessor", settings),
        tokenizer=Call("PreTrainedTokenizerFast",
                       dict(tokenizer_object=tokenizer.backend_tokenizer)),
      ),
      dict(text=[text], videos=[frames],
           videos_kwargs=dict(video_metadata=[metadata])),
    ))  # fmt: skip
  return dict(zip(cases, run_calls(calls), strict=True))


def generate(hf, given, **settings):
  """The ids of the greedy answer of transformers."""
  inputs = {key: torch.tensor(value) for key, value in given.items()}
  pad = qwen.make_tokenizer().pad_token_id
  with torch.no_grad():
    out = hf.generate(
      **inputs, max_new_tokens=64, do_sample=False, pad_token_id=pad, **settings
    )
  return out[0, inputs["input_ids"].shape[1] :].tolist()


def say(hf, given, **settings):
  """The greedy answer of transformers."""
  tokenizer = qwen.make_tokenizer()
  settings = settings or {"eos_token_id": tokenizer.eos_token_id}
  said = generate(hf, given, **settings)
  return tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.torchvision
def test_the_command_with_limits_prints_the_answer_of_transformers(made, prompts):
  hf, folder = made
  grids = [prompts[name]["video_grid_thw"].tolist() for name in ("limited", "wide")]
  assert grids[0] != grids[1]
  flags = (f"--{name}={value}" for name, value in LIMITS.items())
  got = chats.run_command(folder, [folder / "wide.mp4"], QUESTION, *flags)
  assert got == say(hf, prompts["limited"])


@pytest.mark.torchvision
@pytest.mark.parametrize("name", CLIPS)
def test_greedy_answers_equal_transformers(made, talk, prompts, name):
  hf, folder = made
  tokenizer, given = qwen.make_tokenizer(), prompts[name]
  clip, answers = answer(talk, folder / f"{name}.mp4")
  assert list(clip.layouts[0].grid) == given["video_grid_thw"][0].tolist()
  batch = chat_stream._encode_conversation(talk, clip, (), QUESTION)
  ids = batch.tokens[batch.mask]
  pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
  np.testing.assert_array_equal(np.where(ids < 0, pad, ids), given["input_ids"][0])
  assert answers.texts[0] == say(hf, given)


@pytest.fixture(scope="module")
def second(made, prompts, tmp_path_factory):
  """A checkpoint whose answer about "short" ends with the second of two EOS ids.

  <|endoftext|> has the embedding of a token of the answer, a little longer. So it is
  said in the place of that token.
  """
  folder, tokenizer = tmp_path_factory.mktemp("second"), qwen.make_tokenizer()
  hf = qwen.write_checkpoint(folder)
  stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
  said = generate(hf, prompts["short"], eos_token_id=stops)
  token = next(i for n, i in enumerate(said) if n > 3 and i not in said[:n])
  rows = hf.get_input_embeddings().weight
  with torch.no_grad():
    rows[stops[1]] = 1.01 * rows[token]
  hf.generation_config.update(eos_token_id=stops, repetition_penalty=1.3)
  hf.save_pretrained(folder)
  want = generate(hf, prompts["short"], repetition_penalty=1.0)
  assert want == [*said[: said.index(token)], stops[1]]
  return hf, folder, stops


@pytest.mark.torchvision
def test_an_answer_ends_with_the_second_eos_as_in_transformers(made, second, prompts):
  hf, folder, stops = second
  lines = []
  talk = chats.open_model(folder, lines.append, grids="exact")
  assert talk.run.stops == tuple(stops)
  _, answers = answer(talk, made[1] / "short.mp4")
  assert answers.texts == [say(hf, prompts["short"], repetition_penalty=1.0)]
  assert answers.stopped == [True]
  assert "not used" in lines[0] and "repetition_penalty=1.3" in lines[0]
