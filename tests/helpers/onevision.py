"""Tiny random LLaVA-OneVision models: of transformers, and ours with its weights."""

import functools
import json

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from tests.helpers import qwen
from tests.helpers.checkpoints import shake
from vlmrlaif_jax.data.processors.llava_onevision import (
  LlavaOnevisionProcessor,
  cut_square_patches,
)
from vlmrlaif_jax.huggingface import families
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import layers, llava_onevision, projector, vlm
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
  connector = projector.Connector(llm.embed)
  if not merged:
    merger = llava_onevision.NewlineMerger(llm.embed)
    connector = llava_onevision.SourceConnector(merger)
  model = llava_onevision.Model(**{**TOWER, "merges": merged, **tower})
  return vlm.VLM(model, connector, llm)


def theirs(model, **settings):
  """A random model of transformers in the sizes of ours."""
  text = layers.write_fields(qwen2.CONFIG, model.llm)
  vision = layers.write_fields(llava_onevision.CONFIG, model.vision)
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
  """Tensors by the names of published checkpoints."""
  state = hf.state_dict()
  if hf.config.text_config.tie_word_embeddings:
    del state["lm_head.weight"]
  return {
    families.rename_tensor("llava_onevision", name): x for name, x in state.items()
  }


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
# The template of transformers' conversion, and that of older published files.
TEMPLATE = """\
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- for c in m.content | selectattr('type', 'equalto', 'image') -%}
    {{- '<image>\\n' -}}
  {%- endfor -%}
  {%- for c in m.content | selectattr('type', 'equalto', 'video') -%}
    {{- '<video>\\n' -}}
  {%- endfor -%}
  {%- for c in m.content | selectattr('type', 'equalto', 'text') -%}
    {{- c.text -}}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
OLD_TEMPLATE = (
  TEMPLATE.replace("m.role + '\\n'", "m.role + ' '")
  .replace(">\\n'", ">'")
  .replace("{{- c.text", "{{- '\\n' + c.text")
)


def write_checkpoint(folder, frames=6, tied=True):
  """A folder as transformers writes it; returns the model."""
  tokenizer = make_tokenizer()
  ids = {f"{name}_token_index": tokenizer.convert_tokens_to_ids(f"<{name}>")
         for name in ("image", "video")}  # fmt: skip
  hf = theirs(build(vocab=len(tokenizer), tied=tied), **ids)
  hf.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  size = {"height": IMAGE, "width": IMAGE}
  settings = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
  pinpoints = {"image_grid_pinpoints": [list(pair) for pair in PINPOINTS]}
  for name, more in (
    ("preprocessor_config", pinpoints),
    ("video_preprocessor_config", {"num_frames": frames}),
  ):
    (folder / f"{name}.json").write_text(json.dumps(settings | more))
  return hf


def write_original(folder, hf, **settings):
  """The layout of the LLaVA repository, with the config of its tower next to it."""
  tower = folder.parent / "tower"
  tower.mkdir()
  vision = hf.config.vision_config.to_dict()
  vision["num_hidden_layers"] += 1  # The last layer is not used.
  (tower / "config.json").write_text(json.dumps(vision))
  text = hf.config.text_config.to_dict()
  config = {
    **{key: text[key] for key in qwen2.CONFIG.values() if key in text},
    "rope_theta": text["rope_parameters"]["rope_theta"],
    "model_type": "llava_qwen",
    "hidden_act": "silu",
    "mm_vision_tower": "tower",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_hidden_size": vision["hidden_size"],
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[wide, high] for high, wide in PINPOINTS],
    "use_mm_proj": True,
    **settings,
  }
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  lead = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
          ("multi_modal_projector.linear_1", "model.mm_projector.0"),
          ("multi_modal_projector.linear_2", "model.mm_projector.2"),
          ("vision_tower.", "model.vision_tower.vision_tower."),
          ("image_newline", "model.image_newline"))  # fmt: skip
  tensors = {
    new + name.removeprefix(old): x.contiguous()
    for name, x in tensors_of(hf).items()
    for old, new in lead
    if name.startswith(old)
  }
  save_file(tensors, folder / "model.safetensors")


def make_tokenizer(template=TEMPLATE):
  """Bytes, a few words, and the special tokens of LLaVA-OneVision."""
  return qwen.make_tokenizer(template, SPECIAL, "user assistant")
