"""Small tokenizers of bases, and what transformers makes of an export."""

import functools
import json
import shutil

import av
import numpy as np
import torch
import transformers

from tests.data import tricky
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.processors.llava import lay_out_features
from vlmrlaif_jax.runtime import run
from vlmrlaif_jax.serving import export_files

# Tokenizer -> what its tokenizer_config.json has besides tricky's.
LLAMAS = {
  "llama": {"add_bos_token": True},
  "llama_without_bos": {"add_bos_token": False},
  "llama_with_eos": {"add_bos_token": False, "add_eos_token": True},
  "llama_of_v0": {"add_bos_token": True, "extra_special_tokens": ["###"]},
  "new_llama": {"add_bos_token": True, "legacy": False},
  "new_llama_without_bos": {"add_bos_token": False, "legacy": False},
}
QWENS = {
  "qwen": {},
  # It names a BOS that it never adds.
  "qwen_with_idle_bos": {"bos_token": "<|endoftext|>", "add_bos_token": False},
  # It adds the BOS that its chat template lacks.
  "qwen_with_bos": {"bos_token": "<|endoftext|>", "add_bos_token": True},
}
LLAMA_TEMPLATES = ("vicuna_v1", "llava_v1", "brief", "chat_template")
# All pairs of a tokenizer and a template whose end it has as a special token.
PAIRS = [
  *((name, template) for name in LLAMAS for template in LLAMA_TEMPLATES),
  ("llama_of_v0", "llava_v0"),
  *((name, template) for name in QWENS for template in ("qwen", "chat_template")),
  *(("shipped", template) for template in LLAMA_TEMPLATES),
]
_sentencepiece_model = functools.cache(tricky.sentencepiece_model)
_bytes_model = functools.cache(tricky.bytes_model)


def write_tokenizer(folder, name):
  """Writes the files of a tokenizer of LLAMAS or QWENS, or the shipped model's."""
  if name == "shipped":
    parts = shutil.ignore_patterns("*.safetensors", "clip", "config.json")
    return shutil.copytree(run.resolve_checkpoint("builtin:tiny"), folder, ignore=parts)
  if name in LLAMAS:
    tricky.llama(folder, _sentencepiece_model(), legacy=True)
  else:
    tricky.qwen(folder, _bytes_model())
  path = folder / "tokenizer_config.json"
  more = {**LLAMAS, **QWENS}[name]
  path.write_text(json.dumps(json.loads(path.read_text()) | more))
  if name in QWENS and more.get("add_bos_token"):  # tokenizer.json has it, not config.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
  return folder


def make_config(vision="clip", vocab=512):
  """What write_files reads of a base's config."""
  return {
    "text_config": {"vocab_size": vocab},
    "vision_config": {
      "model_type": f"{vision}_vision_model",
      "image_size": 16,
      "patch_size": 4,
    },
    "vision_feature_select_strategy": "full" if vision == "siglip" else "default",
  }


def write_files(folder, base, template="vicuna_v1", vision="clip"):
  """Writes the files of an export without weights, and the config that loads them."""
  folder.mkdir(exist_ok=True)
  export_files.write_files(
    folder, base, make_config(vision), template=template, frames=3
  )
  (folder / "config.json").write_text('{"model_type": "llava"}')
  return folder


read_tokenizer = functools.cache(tokenization.load_tokenizer)
read_processor = functools.cache(transformers.AutoProcessor.from_pretrained)


def our_ids(folder, template, turns, image, *, patches=0, system=None):
  """The ids of the policy's own prompt, with an id of transformers for the video."""
  ids = tokenization.encode_conversation(
    read_tokenizer(folder),
    tokenization.get_template(template),
    turns,
    video=lay_out_features(patches),
    system=system,
  ).ids
  return [image if i == tokenization.VIDEO_TOKEN else i for i in ids]


def make_messages(turns, image=None, system=None):
  """The conversation as transformers takes it, the image in its first message."""
  messages = [] if system is None else [text_of("system", system)]
  for i, (question, answer) in enumerate(turns):
    asked = text_of("user", question)
    if image is not None and i == 0:
      asked["content"].insert(0, {"type": "image", "image": image})
    messages.append(asked)
    if answer is not None:
      messages.append(text_of("assistant", answer))
  return messages


def text_of(role, text):
  return {"role": role, "content": [{"type": "text", "text": text}]}


def their_inputs(folder, messages):
  """What the exported processor makes of a conversation."""
  return read_processor(folder).apply_chat_template(
    messages,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
  )


def their_answer(folder, model, inputs, max_new):
  """The greedy answer of transformers by the folder's own settings of generation."""
  with torch.no_grad():
    out = model.generate(**inputs, max_new_tokens=max_new)
  start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
  text = read_processor(folder).decode(out[0, start:], skip_special_tokens=True)
  return text.strip().rstrip("\ufffd")  # Half of a character, as in chat_stream.


def write_clip(path, frames, height=48, width=64):
  """A clip of noise that is not square, and its frames as they are read back."""
  rng = np.random.default_rng(0)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.height, stream.width = height, width
    for _ in range(frames):
      pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())
  with av.open(str(path)) as container:
    return [frame.to_image() for frame in container.decode(video=0)]
