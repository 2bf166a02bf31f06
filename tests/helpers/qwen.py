"""Tiny random Qwen3-VL models: of transformers, and ours with its weights."""

import functools
import json

import jax
import numpy as np
import tokenizers
import torch
import transformers

from tests.helpers.checkpoints import shake
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import layers, projector, qwen3_vl, vlm
from vlmrlaif_jax.models.decoders import qwen3

VIDEO_PAD, VISION_START, VISION_END = 60, 61, 62
SECTIONS = (4, 2, 2)  # Frequencies of each axis, half of a head.
TOWER = {**qwen3_vl.VARIANTS["tiny"], "activation": "gelu_pytorch_tanh"}


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
           "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
# The template of Qwen3-VL, without tools and system prompts.
TEMPLATE = """\
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if m.content is string -%}
    {{- m.content -}}
  {%- else -%}
    {%- for c in m.content -%}
      {%- if c.type == 'video' -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif c.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- else -%}
        {{- c.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
PIXELS = {"shortest_edge": 256, "longest_edge": 8192}  # Of images and clips.


def make_tokenizer(template=TEMPLATE, special=SPECIAL, words="1.5 seconds, user"):
  """Bytes, a few words, and the special tokens of Qwen or of a relative."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer, tokenizer.decoder = split, tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=split.alphabet(), show_progress=False
  )
  said = ["What happens in the video? The red ring moves.", words]
  tokenizer.train_from_iterator(said, trainer)
  tokenizer.add_special_tokens(special)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
    additional_special_tokens=special, chat_template=template,
  )  # fmt: skip


def read_ids(tokenizer):
  """The ids of the tokens around and in place of vision features."""
  names = ("image_pad", "video_pad", "vision_start", "vision_end")
  return {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}


def write_files(folder, tokenizer, size):
  """Writes a tokenizer and the configs of the processors."""
  tokenizer.save_pretrained(folder)
  for name in ("preprocessor_config", "video_preprocessor_config"):
    settings = {"patch_size": 4, "size": size, "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(settings))


def write_checkpoint(folder):
  """A folder as transformers writes it; returns the model."""
  tokenizer = make_tokenizer()
  hf = theirs(build(vocab=len(tokenizer)), read_ids(tokenizer))
  hf.save_pretrained(folder)
  write_files(folder, tokenizer, PIXELS)
  return hf


def build(**fields):
  llm = qwen3.Model(
    **{**qwen3.VARIANTS["tiny"], "layers": 3, "rope_base": 5e6, **fields},
    mrope=SECTIONS, mrope_interleaved=True,
  )  # fmt: skip
  tower = qwen3_vl.Model(**TOWER)
  return vlm.VLM(tower, projector.Connector(llm.embed), llm)


IDS = {"image_pad": 59, "video_pad": VIDEO_PAD, "vision_start": VISION_START,
       "vision_end": VISION_END}  # fmt: skip


def theirs(model, ids=IDS):
  """A random model of transformers in the sizes of ours."""
  torch.manual_seed(1)
  text = layers.write_fields(qwen3.CONFIG, model.llm)
  text |= {"head_dim": model.llm.head_dim, "tie_word_embeddings": model.llm.tied}
  text["rope_parameters"] = {
    "rope_type": "default", "rope_theta": model.llm.rope_base,
    "mrope_section": list(model.llm.mrope), "mrope_interleaved": True,
  }  # fmt: skip
  config = transformers.Qwen3VLConfig(
    text_config=text,
    vision_config=layers.write_fields(qwen3_vl.CONFIG, model.vision),
    tie_word_embeddings=model.llm.tied,
    image_token_id=ids["image_pad"],
    video_token_id=ids["video_pad"],
    vision_start_token_id=ids["vision_start"],
    vision_end_token_id=ids["vision_end"],
  )
  return shake(transformers.Qwen3VLForConditionalGeneration(config))


def convert(model, hf):
  """Our variables with the weights of a model of transformers."""
  tensors = {name: x.numpy() for name, x in hf.state_dict().items()}
  tensors.pop("lm_head.weight")  # Tied.
  return {"params": convert_from_hf(qwen3_vl.HF, tensors, vlm.get_param_shapes(model))}


@functools.cache
def pair():
  """(the model of transformers, ours, our variables)."""
  model = build()
  hf = theirs(model)
  return hf, model, convert(model, hf)


def full_config(hf):
  """The config of a model of transformers, as families.match_config completes it."""
  config = hf.config.to_dict()
  tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
  return {**config, "text_config": {**config["text_config"], **tied}}


GRID = (2, 4, 6)


def _row(video_id):
  """A row of text and a video, and the positions and pixels of both models."""
  tokens = np.array([[1, *[video_id] * 12, 7, 8, 9]])
  positions = np.tile(np.arange(16)[:, None], (1, 1, 3))
  pixels = np.random.default_rng(0).normal(size=(48, 96)).astype(np.float32)
  return tokens, positions, pixels


def their_logits(hf):
  """The logits of transformers for a row with a video."""
  tokens, positions, pixels = _row(hf.config.video_token_id)
  with torch.no_grad():
    out = hf(
      input_ids=torch.tensor(tokens),
      position_ids=torch.tensor(np.moveaxis(positions, -1, 0)),
      pixel_values_videos=torch.tensor(pixels),
      video_grid_thw=torch.tensor([GRID]),
    )
  return out.logits.numpy()


def our_logits(model, variables, dtype="float32"):
  """Our logits for that row, whose features are saved in a dtype."""
  tokens, positions, pixels = _row(VIDEO_TOKEN)
  features = encode(model, variables, pixels, GRID).astype(dtype)[None]
  assert features.shape == (1, 12, *model.vision.feature_shape)
  mask = np.ones(tokens.shape, bool)
  batch = Batch(features, tokens, mask, ~mask, positions)
  return np.asarray(jax.jit(model.apply)(variables, batch))


def encode(model, variables, pixels, grid):
  """Features of one video: [tokens, features]."""
  time, *sides = grid
  apply = jax.jit(
    functools.partial(model.apply, method="encode"), static_argnames="grid"
  )
  patches = pixels.reshape(time, -1, pixels.shape[-1])
  features = np.asarray(apply(variables, patches, grid=tuple(sides)))
  return features.reshape(-1, features.shape[-1])
