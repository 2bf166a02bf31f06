"""Tiny random Qwen2.5-VL models: of transformers, ours, and their folders."""

import functools
import json
import shutil

import numpy as np
import safetensors.torch
import torch
import transformers

from tests.helpers import qwen
from tests.helpers.checkpoints import shake
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import layers, qwen2_5_vl, vlm

SECTIONS = [4, 2, 2]  # Frequencies of each axis, half of a head.
PIXELS = {"shortest_edge": 256, "longest_edge": 1024}  # Of an image or a frame.
LLM = dict(
  hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
  num_key_value_heads=1, rms_norm_eps=1e-6, max_position_embeddings=4096,
)  # fmt: skip


def theirs(vocab=64, ids=qwen.IDS, **text):
  """A random model of transformers."""
  torch.manual_seed(1)
  rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": SECTIONS}
  tower = qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS["tiny"])
  config = transformers.Qwen2_5_VLConfig(
    text_config=dict(**LLM, vocab_size=vocab, rope_parameters=rope, **text),
    vision_config=dict(
      **layers.write_fields(qwen2_5_vl.CONFIG, tower), tokens_per_second=2
    ),
    image_token_id=ids["image_pad"],
    video_token_id=ids["video_pad"],
    vision_start_token_id=ids["vision_start"],
    vision_end_token_id=ids["vision_end"],
  )
  return shake(transformers.Qwen2_5_VLForConditionalGeneration(config))


def write_checkpoint(folder):
  """A folder as transformers writes it; returns the model."""
  tokenizer = qwen.make_tokenizer()
  hf = theirs(len(tokenizer), qwen.read_ids(tokenizer))
  hf.save_pretrained(folder)
  qwen.write_files(folder, tokenizer, PIXELS)
  return hf


def write_published(folder, source):
  """A folder as published, with the content of one that transformers wrote."""
  shutil.copytree(source, folder)
  config = json.loads((folder / "config.json").read_text())
  text = config.pop("text_config")
  for key in ("model_type", "layer_types"):
    del text[key]
  rope = text.pop("rope_parameters")
  text["rope_theta"] = rope["rope_theta"]
  text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
  text |= {"sliding_window": 32_768, "use_sliding_window": False}
  vision = config["vision_config"]
  for key in ("model_type", "rope_parameters"):
    del vision[key]
  vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": 4}
  (folder / "config.json").write_text(json.dumps({**text, **config}))
  (folder / "video_preprocessor_config.json").unlink()
  path = folder / "model.safetensors"
  tensors = {
    name.replace("model.visual.", "visual.").replace("language_model.", ""): x
    for name, x in safetensors.torch.load_file(path).items()
  }
  safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
  return folder


def convert_tensors(model, hf):
  """Our variables with the weights of a model of transformers."""
  tensors = {name: x.numpy() for name, x in hf.state_dict().items()}
  shapes = vlm.get_param_shapes(model)
  return {"params": convert_from_hf(qwen2_5_vl.HF, tensors, shapes)}


@functools.cache
def pair():
  """(the model of transformers, ours, our variables)."""
  hf = theirs()
  model = convert.make_model(qwen.full_config(hf), "float32")
  return hf, model, convert_tensors(model, hf)


def make_positions(hf, ids, grids, seconds):
  """Positions of a row with one video: those of transformers until its end.

  transformers 5.24 continues after the height or the width of a video. What follows
  continues after the greatest position here, as in the code of the paper.

  Args:
    hf: The model of transformers.
    ids: The row.
    grids: The grid of its video.
    seconds: Seconds of a temporal patch.
  """
  is_video = ids == hf.config.video_token_id
  positions, _ = hf.model.get_rope_index(
    ids, 2 * is_video.long(), video_grid_thw=grids, second_per_grid_ts=seconds
  )
  end = int(is_video[0].nonzero().max()) + 1
  after = torch.arange(ids.shape[1] - end) + positions[..., :end].max() + 1
  positions[..., end:] = after
  return positions


def say(hf, given, max_new, eos, vocab=None):
  """The greedy answer, as a loop over the forward pass of transformers.

  Its `generate` cannot be used, because it counts other positions after a video.

  Args:
    hf: The model.
    given: What the processor of transformers returns for one video.
    max_new: Largest number of tokens.
    eos: The id that ends an answer, which is not returned.
    vocab: Number of the first ids that can be said; None for all.
  """
  ids, grids, seconds, pixels = (
    torch.as_tensor(np.asarray(given[key]))
    for key in (
      "input_ids", "video_grid_thw", "second_per_grid_ts", "pixel_values_videos",
    )
  )  # fmt: skip
  said = []
  for _ in range(max_new):
    with torch.no_grad():
      logits = hf(
        input_ids=ids,
        position_ids=make_positions(hf, ids, grids, seconds),
        pixel_values_videos=pixels,
        video_grid_thw=grids,
      ).logits
    token = int(logits[0, -1, :vocab].argmax())
    if token == eos:
      break
    said.append(token)
    ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
  return said
