"""Tiny checkpoints of random weights, in each layout that is published."""

import functools
import json

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from tests.helpers.rows import text_batch
from vlmrlaif_jax.core.types import VIDEO_TOKEN

IMAGE, PATCHES = 63, 16  # The id that stands for an image, and how many it takes.
TOWER = dict(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=16,
  patch_size=4,
)
LLM = dict(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  rms_norm_eps=1e-4,
)
MATRICES = {  # Of a layer: inputs and outputs.
  "self_attn.q_proj": (32, 32),
  "self_attn.v_proj": (32, 16),
  "mlp.down_proj": (48, 32),
}


def shake(model):
  """Random weights that are far from what any initialiser makes."""
  torch.manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.15 * torch.randn_like(p))
  return model.eval()


def llava(text="llama", vision="clip", rope=None, settings=None, **more):
  """A random LLaVA of transformers that has grouped heads; the same at each call.

  Qwen2's is tied. `rope` and `settings` are of the language model, `more` of the whole.
  """
  torch.manual_seed(1)
  rope = {"rope_type": "default", "rope_theta": 500.0, **(rope or {})}
  texts = {
    "llama": transformers.LlamaConfig,
    "mistral": functools.partial(transformers.MistralConfig, sliding_window=None),
    "qwen2": functools.partial(transformers.Qwen2Config, tie_word_embeddings=True),
    "qwen3": functools.partial(transformers.Qwen3Config, head_dim=16),
  }
  towers = {
    "clip": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
  }
  config = transformers.LlavaConfig(
    vision_config=towers[vision](**TOWER),
    text_config=texts[text](**{**LLM, "rope_parameters": rope, **(settings or {})}),
    image_token_index=IMAGE,
    image_seq_length=PATCHES,
    vision_feature_select_strategy="default" if vision == "clip" else "full",
    **more,
  )
  return shake(transformers.LlavaForConditionalGeneration(config))


def language_tensors(model):
  """By the names that LLaMA has, and the original LLaVA with it."""
  tensors = {
    name.replace("model.language_model.", "model."): x.contiguous()
    for name, x in model.state_dict().items()
    if "language_model" in name or name.startswith("lm_head")
  }
  if model.config.text_config.tie_word_embeddings:
    del tensors["lm_head.weight"]
  return tensors


def projector_tensors(model):
  mlp = model.model.multi_modal_projector
  return {
    f"model.mm_projector.{i}.{leaf}": getattr(layer, leaf).detach()
    for i, layer in ((0, mlp.linear_1), (2, mlp.linear_2))
    for leaf in ("weight", "bias")
  }


def tower_tensors(model):
  """By the names that CLIPVisionModel had before transformers 5."""
  state = model.model.vision_tower.state_dict()
  bare = {name.removeprefix("vision_model."): x for name, x in state.items()}
  return {f"vision_model.{name}": x for name, x in bare.items()}


def write_tower(folder, model):
  """An openai/clip-... folder: both towers in one file, by torch, with a buffer."""
  folder.mkdir()
  config = {
    "model_type": "clip",
    "vision_config": {**TOWER, "model_type": "clip_vision_model"},
    "text_config": {"model_type": "clip_text_model"},
  }
  (folder / "config.json").write_text(json.dumps(config))
  tensors = tower_tensors(model) | {
    "vision_model.embeddings.position_ids": torch.arange(17),
    "text_model.final_layer_norm.weight": torch.ones(4),
    "logit_scale": torch.tensor(2.6),
  }
  torch.save(tensors, folder / "pytorch_model.bin")
  return folder


def original_config(**more):
  return {
    **LLM,
    "rope_theta": 500.0,
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_act": "silu",
    "mm_vision_tower": "openai/tower",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_hidden_size": 32,
    **more,
  }


def write_shards(folder, tensors, count=2):
  """pytorch_model-*.bin and their index, as transformers 4 wrote them."""
  names, weight_map = sorted(tensors), {}
  for i in range(count):
    file = f"pytorch_model-{i + 1:05}-of-{count:05}.bin"
    torch.save({name: tensors[name] for name in names[i::count]}, folder / file)
    weight_map |= dict.fromkeys(names[i::count], file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_original(folder, model, **config):
  """The LLaVA repository's layout in two .bin shards; its tower is a folder beside."""
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(original_config(**config)))
  tensors = language_tensors(model) | projector_tensors(model)
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
  write_shards(folder, tensors)
  return folder


def write_plain(folder, model):
  """Vicuna's layout, and Qwen's."""
  folder.mkdir()
  text = model.config.text_config
  config = {**LLM, "rope_theta": 500.0, "hidden_act": "silu"}
  for key in ("model_type", "head_dim", "tie_word_embeddings"):
    if key in (known := text.to_dict()):
      config[key] = known[key]
  (folder / "config.json").write_text(json.dumps(config))
  save_file(language_tensors(model), folder / "model.safetensors")
  return folder


def factors(rank, layers=2, scale=1):
  """The tensors of a PEFT adapter of MATRICES, `scale` times as wide."""
  torch.manual_seed(1)
  made = {}
  for i in range(layers):
    for module, (inputs, outputs) in MATRICES.items():
      name = f"base_model.model.model.layers.{i}.{module}"
      made[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, scale * inputs)
      made[f"{name}.lora_B.weight"] = 0.3 * torch.randn(scale * outputs, rank)
  return made


def write_adapter(folder, tensors, base, *, rank, alpha=8):
  folder.mkdir(parents=True)
  config = {
    "peft_type": "LORA",
    "base_model_name_or_path": str(base),
    "r": rank,
    "lora_alpha": alpha,
    "bias": "none",
    "target_modules": sorted(
      {name.split(".lora_")[0].split(".")[-1] for name in tensors if ".lora_" in name}
    ),
  }
  (folder / "adapter_config.json").write_text(json.dumps(config))
  torch.save(tensors, folder / "adapter_model.bin")
  return folder


def with_update(model, tensors, *, scale):
  """A model with an adapter's tensors added to its matrices."""
  state = model.state_dict()
  for name, b in tensors.items():
    if "lora_B" in name:
      module = name.removeprefix("base_model.model.model.").removesuffix(
        ".lora_B.weight"
      )
      a = tensors[name.replace("lora_B", "lora_A")]
      state[f"model.language_model.{module}.weight"] += scale * b @ a
  return model


def inputs():
  """Two images with questions of unequal length, padded on the left."""
  rng = np.random.default_rng(0)
  tokens, mask = np.zeros((2, 24), int), np.zeros((2, 24), bool)
  for i, length in enumerate((7, 4)):
    row = [1, *[IMAGE] * PATCHES, *rng.integers(3, 60, length)]
    tokens[i, -len(row) :], mask[i, -len(row) :] = row, True
  return rng.normal(size=(2, 16, 16, 3)).astype(np.float32), tokens, mask


def theirs(model):
  """transformers' logits of the inputs, of the real tokens."""
  pixels, tokens, mask = inputs()
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(tokens),
      pixel_values=torch.tensor(np.moveaxis(pixels, -1, 1)),
      attention_mask=torch.tensor(mask).long(),
      position_ids=torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0)),
    ).logits.numpy()[mask]


def ours(model, variables):
  """The same of our model."""
  pixels, tokens, mask = inputs()
  tokens = np.where(tokens == IMAGE, VIDEO_TOKEN, tokens)
  batch = text_batch(pixels[:, None], tokens, mask, mask)
  return np.asarray(jax.jit(model.apply)(variables, batch))[mask]
