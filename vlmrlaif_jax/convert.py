"""Hugging Face checkpoints into our parameters and back, by each model's HF table."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import flax
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import CLIPConfig, LlavaConfig

from vlmrlaif_jax.models import clip, llama, projector
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.types import Batch, Params

# Path of ours -> (name of theirs, "T" to transpose, "conv" to flatten, or ""); {} in
# a name stands for the layer, and the layers are stacked on axis 0.
Table: TypeAlias = Mapping[str, tuple[str, str]]
Config: TypeAlias = dict[str, Any]  # What a config.json says.

LLAVA: Table = {
  f"{ours}/{path}": (theirs + name, op)
  for ours, theirs, table in (
    ("vision", "vision_tower.vision_model.", clip.HF_VISION),
    ("projector", "multi_modal_projector.", projector.HF),
    ("llm", "language_model.", llama.HF),
  )
  for path, (name, op) in table.items()
}

# Our fields -> theirs.
_LLM = {
  "vocab": "vocab_size",
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "eps": "rms_norm_eps",
}
_TOWER = {
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "activation": "hidden_act",
  "eps": "layer_norm_eps",
}
_VISION = {"image": "image_size", "patch": "patch_size", **_TOWER}
_TEXT = {"vocab": "vocab_size", "context": "max_position_embeddings", **_TOWER}

# Buffers that older versions of transformers wrote beside the parameters.
_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")


# [out, 3, patch, patch] <-> [patch * patch * 3, out]
_flat = lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
_square = lambda x, side: x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)

# From their tensors to ours, and back.
_FROM = {"": lambda x: x, "T": np.transpose, "conv": _flat}
_TO = {
  "": lambda x: x,
  "T": np.transpose,
  "conv": lambda x: _square(x, math.isqrt(x.shape[0] // 3)),
}


def _check_known(table: Table, paths: Iterable[str]):
  unknown = sorted(set(paths) - set(table))
  if unknown:
    raise ValueError(f"parameters without a name in the checkpoint: {unknown}")


def from_hf(table: Table, tensors: Mapping[str, np.ndarray], shapes: Params) -> Params:
  """Parameters of the shapes and dtypes of `shapes`, from a checkpoint's tensors.

  Args:
    table: where each parameter comes from.
    tensors: the checkpoint; name -> array.
    shapes: what jax.eval_shape says of the model's "params".

  Raises:
    ValueError: parameters that the table does not know, tensors that are missing,
      of a wrong shape, or that nothing used.
  """
  wants = flax.traverse_util.flatten_dict(shapes, sep="/")
  _check_known(table, wants)
  sources = {}
  for path, want in wants.items():
    name = table[path][0]
    layers = range(want.shape[0]) if "{}" in name else (None,)
    sources[path] = [name if i is None else name.format(i) for i in layers]
  used = {name for names in sources.values() for name in names}
  missing, unused = sorted(used - set(tensors)), sorted(set(tensors) - used)
  if missing or unused:
    raise ValueError(
      f"missing from the checkpoint: {missing}; of no use in it: {unused}"
    )

  params = {}
  for path, want in wants.items():
    name, op = table[path]
    parts = [_FROM[op](tensors[name]) for name in sources[path]]
    value = np.stack(parts) if "{}" in name else parts[0]
    if value.shape != want.shape:
      raise ValueError(f"{path} must have shape {want.shape}; {name} has {value.shape}")
    params[path] = value.astype(want.dtype)
  return flax.traverse_util.unflatten_dict(params, sep="/")


def to_hf(table: Table, params: Params) -> dict[str, np.ndarray]:
  """A checkpoint's tensors from our parameters: the inverse of from_hf.

  Raises:
    ValueError: parameters that the table does not know.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  _check_known(table, flat)
  tensors = {}
  for path, leaf in flat.items():
    name, op = table[path]
    if "{}" in name:
      layers = enumerate(np.asarray(leaf))
      tensors |= {name.format(i): _TO[op](layer) for i, layer in layers}
    else:
      tensors[name] = _TO[op](np.asarray(leaf))
  return tensors


def llava_name(name: str) -> str:
  """The name in LLaVA's published checkpoints, whichever version wrote it."""
  name = re.sub(r"^model\.(?=language_model|vision_tower|multi_modal)", "", name)
  name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
  name = re.sub(
    r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name
  )
  return re.sub(
    r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name
  )


class Checkpoint(Mapping[str, np.ndarray]):
  """The tensors of a folder's safetensors files, each read when it is asked for."""

  def __init__(self, folder: Path, rename=lambda name: name):
    self._places = {}  # Our name -> the open file, and the name in it.
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
      raise FileNotFoundError(f"no *.safetensors file in {folder}")
    for path in paths:
      file = safe_open(path, framework="numpy")
      for name in file.keys():
        if not _BUFFERS.search(name):
          self._places[rename(name)] = file, name

  def __getitem__(self, name: str) -> np.ndarray:
    file, there = self._places[name]
    return file.get_tensor(there)

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)


def _save(folder: Path, table: Table, params: Params, config: Config, dtype: str):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2))
  tensors = {
    name: np.asarray(x, jnp.dtype(dtype), order="C")
    for name, x in to_hf(table, params).items()
  }
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _take(fields: Mapping[str, str], config: Config) -> dict[str, Any]:
  return {ours: config[theirs] for ours, theirs in fields.items()}


def _check(config: Config, **supported):
  for name, value in supported.items():
    if config[name] != value:
      raise ValueError(f"{name} must be {value!r}, not {config[name]!r}")


def load_llava(
  folder: str | Path,
  *,
  rank: int = 0,
  alpha: float = 16.0,
  dtype: str = "bfloat16",
  remat: bool = True,
  scalar_head: bool = False,
) -> tuple[VLM, Params, Config]:
  """A LlavaForConditionalGeneration folder as our model, its "params" and config.

  Args:
    folder: holds config.json and *.safetensors, of any version of transformers.
    rank: of the LoRA updates of the language model; 0 for none.
    alpha: of those updates.
    dtype: of the computation, and of the tower's and language model's parameters.
      The projector's are in float32, since some stages train them.
    remat: whether to recompute each layer in the backward pass.
    scalar_head: whether the model has one; its parameters are not in the folder.
  """
  folder = Path(folder)
  config = LlavaConfig.from_pretrained(folder).to_dict()
  text = config["text_config"]
  _check(
    config, vision_feature_select_strategy="default", multimodal_projector_bias=True
  )
  _check(text, hidden_act="silu", attention_bias=False, tie_word_embeddings=False)
  _check(text["rope_parameters"], rope_type="default")
  types = dict(dtype=dtype, param_dtype=dtype)
  build = lambda head: VLM(
    vision=clip.VisionTower(
      **_take(_VISION, config["vision_config"]),
      select_layer=config["vision_feature_layer"],
      **types,
    ),
    projector=projector.Projector(
      text["hidden_size"], activation=config["projector_hidden_act"], dtype=dtype
    ),
    llm=llama.Model(
      **_take(_LLM, text),
      rope_base=text["rope_parameters"]["rope_theta"],
      rank=rank,
      alpha=alpha,
      remat=remat,
      **types,
    ),
    scalar_head=head,
  )
  tensors = Checkpoint(folder, llava_name)
  shapes = param_shapes(build(False))
  return build(scalar_head), from_hf(LLAVA, tensors, shapes), config


def param_shapes(model: VLM) -> Params:
  """Shapes and dtypes of a VLM's "params"; computes nothing."""
  size = model.vision.image
  tokens = jnp.zeros((1, 1), int)
  batch = Batch(jnp.zeros((1, 1, size, size, 3)), tokens, tokens == 0, tokens == 0)
  return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


def llava_config(model: VLM, *, image_token: int) -> Config:
  """The config.json of a VLM that was not loaded from one.

  Args:
    model: of this project.
    image_token: the id that stands for the video in prompts given to transformers.
  """
  give = lambda fields, part: {fields[f]: part.__dict__[f] for f in fields}
  llm, vision = model.llm, model.vision
  text = {
    **give(_LLM, llm),
    "head_dim": llm.head_dim or llm.embed // llm.heads,
    "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_base},
    "model_type": "llama",
  }
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": image_token,
    "image_seq_length": (vision.image // vision.patch) ** 2,
    "projector_hidden_act": model.projector.activation,
    "vision_feature_layer": vision.select_layer,
    "vision_feature_select_strategy": "default",
    "text_config": text,
    "vision_config": {**give(_VISION, vision), "model_type": "clip_vision_model"},
  }


def save_llava(
  folder: str | Path, params: Params, config: Config, dtype: str = "float16"
):
  """Writes what transformers loads as a LlavaForConditionalGeneration.

  Args:
    folder: gets config.json and model.safetensors.
    params: of a VLM without a head; LoRA updates are to be merged before.
    config: as load_llava or llava_config returns it.
    dtype: of the tensors that are written.
  """
  _save(Path(folder), LLAVA, params, config, dtype)


def load_clip(
  folder: str | Path, *, dtype: str = "float32"
) -> tuple[clip.CLIP, Params, Config]:
  """A CLIPModel folder as our model, its "params" and config."""
  folder = Path(folder)
  config = CLIPConfig.from_pretrained(folder).to_dict()
  types = dict(dtype=dtype, param_dtype=dtype)
  model = clip.CLIP(
    clip.VisionTower(**_take(_VISION, config["vision_config"]), **types),
    clip.TextTower(**_take(_TEXT, config["text_config"]), **types),
    config["projection_dim"],
  )
  pixels = jnp.zeros((1, model.vision.image, model.vision.image, 3))
  tokens = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)
  return model, from_hf(clip.HF, Checkpoint(folder), shapes["params"]), config


def clip_config(model: clip.CLIP, *, end: int) -> Config:
  """The config.json of a CLIP that was not loaded from one.

  Args:
    end: the id that ends a caption, where the text tower is read.
  """
  give = lambda fields, part: {fields[f]: part.__dict__[f] for f in fields}
  return {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": model.features,
    "text_config": {
      **give(_TEXT, model.text),
      "model_type": "clip_text_model",
      "eos_token_id": end,
    },
    "vision_config": {**give(_VISION, model.vision), "model_type": "clip_vision_model"},
  }


def save_clip(folder: str | Path, params: Params, config: Config, dtype="float32"):
  """Writes what transformers loads as a CLIPModel.

  Args:
    config: as load_clip or clip_config returns it.
  """
  _save(Path(folder), clip.HF, params, config, dtype)
