"""Tiny random Qwen3-VL models: of transformers, and ours with its weights."""

import functools

import jax
import numpy as np
import torch
import transformers

from tests.helpers.checkpoints import shake
from vlmrlaif_jax.huggingface import checkpoint_layouts
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import qwen3_vl, vlm
from vlmrlaif_jax.models.decoders import qwen3

VIDEO_PAD, VISION_START, VISION_END = 60, 61, 62
SECTIONS = (4, 2, 2)  # Frequencies of each axis, half of a head.
TOWER = {**qwen3_vl.VARIANTS["tiny"], "activation": "gelu_pytorch_tanh"}


def build(**fields):
  llm = qwen3.Model(
    **{**qwen3.VARIANTS["tiny"], "layers": 3, "rope_base": 5e6},
    mrope=SECTIONS, mrope_interleaved=True, **fields,
  )  # fmt: skip
  tower = qwen3_vl.Model(**TOWER)
  return vlm.VLM(tower, qwen3_vl.Connector(llm.embed), llm)


def theirs(model):
  """A random model of transformers in the sizes of ours."""
  torch.manual_seed(1)
  text = checkpoint_layouts.write_fields(qwen3.CONFIG, model.llm)
  text |= {"head_dim": model.llm.head_dim, "tie_word_embeddings": model.llm.tied}
  text["rope_parameters"] = {
    "rope_type": "default", "rope_theta": model.llm.rope_base,
    "mrope_section": list(model.llm.mrope), "mrope_interleaved": True,
  }  # fmt: skip
  config = transformers.Qwen3VLConfig(
    text_config=text,
    vision_config=checkpoint_layouts.write_fields(qwen3_vl.CONFIG, model.vision),
    tie_word_embeddings=model.llm.tied,
    image_token_id=59,
    video_token_id=VIDEO_PAD,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
  )
  return shake(transformers.Qwen3VLForConditionalGeneration(config))


def table():
  prefix = lambda ours, theirs, names: {
    f"{ours}/{path}": (theirs(name), op) for path, (name, op) in names.items()
  }
  text = lambda name: name.replace("model.", "model.language_model.", 1)
  return {
    **prefix("vision", lambda name: f"model.visual.{name}", qwen3_vl.HF_VISION),
    **prefix("llm", text, qwen3.HF),
  }


def convert(model, hf):
  """Our variables with the weights of a model of transformers."""
  tensors = {name: x.numpy() for name, x in hf.state_dict().items()}
  tensors.pop("lm_head.weight")  # Tied.
  return {"params": convert_from_hf(table(), tensors, vlm.get_param_shapes(model))}


@functools.cache
def pair():
  """(the model of transformers, ours, our variables)."""
  model = build()
  hf = theirs(model)
  return hf, model, convert(model, hf)


def encode(model, variables, pixels, grid):
  """Features of one video: [tokens, features]."""
  time, *sides = grid
  apply = jax.jit(
    functools.partial(model.apply, method="encode"), static_argnames="grid"
  )
  patches = pixels.reshape(time, -1, pixels.shape[-1])
  features = np.asarray(apply(variables, patches, grid=tuple(sides)))
  return features.reshape(-1, features.shape[-1])
