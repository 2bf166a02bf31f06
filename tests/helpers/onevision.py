"""Tiny random LLaVA-OneVision models: of transformers, and ours with its weights."""

import functools

import numpy as np
import tokenizers
import torch
import transformers

from tests.helpers.checkpoints import shake
from vlmrlaif_jax.data.processors.llava_onevision import (
  LlavaOnevisionProcessor,
  cut_square_patches,
)
from vlmrlaif_jax.huggingface import checkpoint_layouts
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import llava_onevision, vlm
from vlmrlaif_jax.models.decoders import qwen2

IMAGE, PATCH, SIDE, POOLED = 22, 4, 5, 3  # A margin is cut off, and pooling is odd.
TOWER = {**llava_onevision.VARIANTS["tiny"], "image": IMAGE, "patch": PATCH}
SIDES = [IMAGE * count for count in range(1, 7)]
PINPOINTS = tuple((height, width) for height in SIDES for width in SIDES)
PROCESSOR = LlavaOnevisionProcessor(
  image=IMAGE, patch=PATCH, pinpoints=PINPOINTS, width=TOWER["out"]
)


def build(merged=True, tied=True, vocab=64, **tower):
  llm = qwen2.Model(**{**qwen2.VARIANTS["tiny"], "vocab": vocab, "tied": tied})
  merger = None if merged else llava_onevision.NewlineMerger(llm.embed)
  model = llava_onevision.Model(**{**TOWER, "merged": merged, **tower})
  return vlm.VLM(model, llava_onevision.SourceConnector(llm.embed, merger), llm)


def theirs(model, **settings):
  """A random model of transformers in the sizes of ours."""
  text = checkpoint_layouts.write_fields(qwen2.CONFIG, model.llm)
  vision = checkpoint_layouts.write_fields(llava_onevision.CONFIG, model.vision)
  text["rope_parameters"] |= {"rope_type": "default"}
  config = transformers.LlavaOnevisionConfig(
    text_config={**text, "model_type": "qwen2"},
    vision_config={
      **vision, "model_type": "siglip_vision_model", "vision_use_head": False
    },
    image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
    tie_word_embeddings=model.llm.tied,
    **{"image_token_index": 62, "video_token_index": 63, **settings},
  )  # fmt: skip
  torch.manual_seed(1)
  return shake(transformers.LlavaOnevisionForConditionalGeneration(config))


def tensors_of(hf):
  """Tensors by the names that transformers writes."""
  lead = (("model.language_model.", "language_model.model."),
          ("lm_head.", "language_model.lm_head."), ("model.", ""))  # fmt: skip
  tensors = {}
  for name, x in hf.state_dict().items():
    for old, new in lead:
      if name.startswith(old):
        name = new + name.removeprefix(old)
        break
    tensors[name] = x
  if hf.config.text_config.tie_word_embeddings:
    del tensors["language_model.lm_head.weight"]
  return tensors


def convert(model, hf):
  """Our variables with the weights of a model of transformers."""
  tensors = {name: np.asarray(x) for name, x in tensors_of(hf).items()}
  shapes = vlm.get_param_shapes(model)
  return {"params": convert_from_hf(llava_onevision.HF, tensors, shapes)}


@functools.cache
def pair():
  """(the model of transformers, ours, our variables)."""
  model = build()
  hf = theirs(model)
  return hf, model, convert(model, hf)


def make_squares(count, seed=0):
  """Normalized frames or crops, for transformers and for our tower."""
  shape = (count, IMAGE, IMAGE, 3)
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  side = SIDE * PATCH
  patches = cut_square_patches(x[:, :side, :side], PATCH)
  ours = patches.reshape(count, SIDE**2, -1)
  return torch.tensor(np.moveaxis(x, -1, 1)), ours


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
# The template of the published checkpoints.
TEMPLATE = """\
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + ' ' -}}
  {%- for c in m.content | selectattr('type', 'equalto', 'image') -%}
    {{- '<image>' -}}
  {%- endfor -%}
  {%- for c in m.content | selectattr('type', 'equalto', 'video') -%}
    {{- '<video>' -}}
  {%- endfor -%}
  {%- for c in m.content | selectattr('type', 'equalto', 'text') -%}
    {{- '\\n' + c.text -}}
  {%- endfor -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_tokenizer():
  """Bytes, a few words, and the special tokens of LLaVA-OneVision."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer, tokenizer.decoder = split, tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=split.alphabet(), show_progress=False
  )
  said = ["What happens in the video? The red ring moves.", "user assistant"]
  tokenizer.train_from_iterator(said, trainer)
  tokenizer.add_special_tokens(SPECIAL)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
    additional_special_tokens=SPECIAL, chat_template=TEMPLATE,
  )  # fmt: skip
