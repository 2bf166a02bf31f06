"""Loads published checkpoints as VLMs and saves VLMs for transformers.

`load_checkpoint` and `save_checkpoint` are the main functions.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import stop_tokens
from vlmrlaif_jax.data import tokenization as texts
from vlmrlaif_jax.data.processors.interface import Processor
from vlmrlaif_jax.data.processors.llava import LlavaProcessor
from vlmrlaif_jax.huggingface import (
  checkpoint_folders,
  checkpoint_layouts,
  config_keys,
  families,
)
from vlmrlaif_jax.huggingface import tensor_files as files
from vlmrlaif_jax.huggingface.checkpoint_layouts import (
  DECODER_FAMILIES,
  TOWER_FAMILIES,
  HfConfig,
)
from vlmrlaif_jax.huggingface.families import FAMILIES
from vlmrlaif_jax.huggingface.param_mapping import (
  NameTable,
  PackedKernel,
  convert_from_hf,
  convert_to_hf,
)
from vlmrlaif_jax.models import clip, projector, siglip
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.layers import DTypes, read_fields, write_fields
from vlmrlaif_jax.models.ops.quantization import SCHEMES, quantize_params
from vlmrlaif_jax.models.projector import PROJECTOR_ACTIVATIONS
from vlmrlaif_jax.models.vlm import VLM, get_param_shapes

# Model type of a tower -> the tokens that LLaVA reads. "default" drops the class token.
_SELECT_STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}

# Model type of a language model -> values that its config must have.
_REQUIRED_VALUES = {
  "llama": dict(attention_bias=False, mlp_bias=False),
  "mistral": {},
  "qwen2": {},
  "qwen3": dict(attention_bias=False),
}

HEAD_TABLE: NameTable = {"kernel": ("weight", "T"), "bias": ("bias", "")}


def make_model(config: HfConfig, dtype: str, *, train_merger: bool = False) -> VLM:
  """Builds the model of a layout's config; see load_checkpoint.

  Raises:
    ValueError: The config has a value that the layers do not support.
  """
  if (family := FAMILIES.get(config["model_type"])) is not None:
    return family.models.make_model(config, dtype, train_merger)
  return make_llava_model(config, dtype)


def make_table(config: HfConfig, *, train_merger: bool = False) -> NameTable:
  """Returns the sources of a model's parameters in the tensors of its layout."""
  if config["model_type"] in FAMILIES:
    return families.make_family_table(config, train_merger=train_merger)
  parts = (config[f"{part}_config"]["model_type"] for part in ("text", "vision"))
  return checkpoint_layouts.make_llava_table(*parts)


def load_processor(
  folder: Path, config: HfConfig, model: VLM, frames: int
) -> Processor:
  """Returns the processor of a checkpoint.

  Args:
    folder: Folder of the checkpoint.
    config: Config of its layout.
    model: Model of the checkpoint.
    frames: Frames per video, for a family with a fixed number.
  """
  if config["model_type"] in FAMILIES:
    place = checkpoint_folders.find_processor_folder(folder)
    return families.read_processor(place, config)
  tower = model.vision
  return LlavaProcessor(frames, tower.image, tower.patch, tower.padding_color)


def get_model_types(model: VLM) -> tuple[str, str]:
  """Returns the model types of a VLM's language model and tower.

  A Mistral without a window equals a Llama.
  """
  text = "qwen3" if model.llm.qk_norm else "qwen2" if model.llm.qkv_bias else "llama"
  if text == "llama" and model.llm.window is not None:
    text = "mistral"
  is_siglip = isinstance(model.vision, siglip.Model)
  return text, "siglip_vision_model" if is_siglip else "clip_vision_model"


def load_checkpoint(
  folder: str | Path,
  *,
  dtype: str = "bfloat16",
  mesh: Mesh | None = None,
  tower: str = "",
  quant: str = "none",
  train_merger: bool = False,
  note: Callable[[str], None] = lambda line: None,
) -> tuple[VLM, Params, HfConfig]:
  """Loads a checkpoint of a layout that checkpoint_layouts.find_layout detects.

  The files are checked before anything is placed on a device. Fields that no checkpoint
  contains, such as LoRA's rank, have the defaults of Decoder: clone `llm` to set them.

  Args:
    folder: Folder of the checkpoint.
    dtype: Dtype of the computation and of the parameters. The projector's parameters
      are float32, because some stages train them.
    mesh: Mesh on which the parameters are sharded. None returns NumPy arrays.
    tower: Folder of a CLIP or SigLIP, for a checkpoint without a tower.
    quant: "none" or a key of quantization.SCHEMES, which adds the collection "quant"
      with the kernels of the language model's layers. Each layer is quantized after it
      is read, so the devices never hold all original kernels.
    train_merger: Whether the merger of a family other than LLaVA is the projector,
      which SFT trains, instead of a part of the tower.
    note: Receives a line with the layout and the reading speed.

  Returns:
    The model, its variables, and its config as that of its class in transformers.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: A file is damaged, or the files do not fit each other.
  """
  folder = Path(folder)
  layout = checkpoint_layouts.find_layout(folder, tower=tower)
  table = make_table(layout.config, train_merger=train_merger)
  try:
    model = make_model(layout.config, dtype, train_merger=train_merger)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error
  notes = _check_tokenizer(folder, layout.config["text_config"]["vocab_size"])
  total, start = sum(x.nbytes for x in layout.tensors.values()), time.monotonic()
  with files.show_read_progress(total) as on_bytes_read:
    variables = _load_variables(
      layout.tensors, table, model, mesh, quant, on_bytes_read
    )
  seconds, gigabytes = time.monotonic() - start, total / 1e9
  speed = f"{gigabytes:.2f} GB in {seconds:.1f} s ({gigabytes / seconds:.2f} GB/s)"
  note(f"{folder.name}: {'; '.join((layout.name, *layout.notes, *notes, speed))}")
  return model, variables, layout.config


def _load_variables(
  tensors: files.Tensors,
  table: NameTable,
  model: VLM,
  mesh: Mesh | None,
  quant: str,
  on_bytes_read: Callable[[int], None],
) -> Params:
  """Loads the variables of a model; see load_checkpoint."""
  shapes = get_param_shapes(model)
  stored = get_stored_shapes(shapes, quant)
  if mesh is None:
    params = convert_from_hf(table, tensors, shapes, on_bytes_read=on_bytes_read)
    return {"params": params} if quant == "none" else _quantize(params, quant)
  both = {"params": shapes, "quant": stored.get("quant", {})}
  shardings = sharding.shard_by_rules(both, families.SHARDING, mesh)
  kernels = flatten_dict(
    shardings["quant"], sep="/", is_leaf=lambda path, tree: "codes" in tree
  )
  packed = {
    f"{path}/kernel": PackedKernel(SCHEMES[quant], x) for path, x in kernels.items()
  }
  params = convert_from_hf(
    table, tensors, shapes, shardings["params"], on_bytes_read, packed
  )
  flat = flatten_dict(params)
  return unflatten_dict({path: flat[path[1:]] for path in flatten_dict(stored)})


def get_stored_shapes(shapes: Params, quant: str) -> Params:
  """Returns the shapes of loaded variables from those of the original "params".

  Raises:
    ValueError: `quant` is neither "none" nor a key of quantization.SCHEMES.
  """
  if quant == "none":
    return {"params": shapes}
  if quant not in SCHEMES:
    raise ValueError(
      f'--config.model.quant must be "none" or one of {sorted(SCHEMES)}, got {quant!r}'
    )
  return jax.eval_shape(functools.partial(_quantize, quant=quant), shapes)


def _quantize(params: Params, quant: str) -> Params:
  return quantize_params(params, llama.QUANTIZED, scheme=quant)


def make_llava_model(config: HfConfig, dtype: str) -> VLM:
  """Builds the model of a layout's config; see load_checkpoint.

  Raises:
    ValueError: The config has a value that the layers do not support.
  """
  text, vision = config["text_config"], config["vision_config"]
  kind = vision["model_type"]
  _check_values(
    config,
    vision_feature_select_strategy=_SELECT_STRATEGIES[kind],
    multimodal_projector_bias=True,
  )
  _check_values(text, hidden_act="silu", **_REQUIRED_VALUES[text["model_type"]])
  _check_values(vision, num_channels=3)
  if (activation := vision["hidden_act"]) not in clip.CLIP_ACTIVATIONS:
    raise ValueError(
      f"vision_config.hidden_act must be one of {sorted(clip.CLIP_ACTIVATIONS)}, got "
      f"{activation!r}. Give another checkpoint."
    )
  if (activation := config["projector_hidden_act"]) not in PROJECTOR_ACTIVATIONS:
    raise ValueError(
      f"projector_hidden_act must be one of {sorted(PROJECTOR_ACTIVATIONS)}, got "
      f"{activation!r}. Give another checkpoint."
    )
  decoder, tower = DECODER_FAMILIES[text["model_type"]], TOWER_FAMILIES[kind]
  types = DTypes(dtype=dtype, param_dtype=dtype)
  pixels = {
    field: tuple(config[key])
    for field, key in (("mean", "image_mean"), ("std", "image_std"))
    if key in config
  }
  return VLM(
    vision=tower.Model(
      **read_fields(tower.CONFIG, vision),
      select_layer=_read_layers(config, vision["num_hidden_layers"]),
      **pixels,
      **types,
    ),
    projector=projector.Projector(
      text["hidden_size"],
      activation=config["projector_hidden_act"],
      depth=config["projector_depth"],
      dtype=dtype,
    ),
    llm=decoder.Model(
      **read_fields(decoder.CONFIG, text),
      rope_scaling=config_keys.read_rope_scaling(text),
      window=config_keys.read_window(text),
      **types,
    ),
  )


def _read_layers(config: HfConfig, count: int) -> int | tuple[int, ...]:
  """Reads the layers of a tower with `count` layers whose features are used."""
  value = config["vision_feature_layer"]
  layers = value if isinstance(value, list) else [value]
  if not layers or not all(-count - 1 <= layer <= count for layer in layers):
    raise ValueError(
      f"vision_feature_layer must be an integer from {-count - 1} to {count}, or a "
      f"list of them, got {value!r}. Give the config.json of the weights."
    )
  return layers[0] if len(layers) == 1 else tuple(layers)


def _check_tokenizer(folder: Path, vocab: int) -> list[str]:
  """Checks that the embedding has a row for every id of the tokenizer.

  Returns:
    Notes about settings of the tokenizer and of generation that are not used.
  """
  if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model")):
    return []
  tokenizer = texts.load_tokenizer(folder)
  highest = max(tokenizer.get_vocab().values())
  if highest >= vocab:
    raise ValueError(
      f"the tokenizer in {folder} has ids up to {highest}, but the model's vocab_size "
      f"is {vocab}. Give the model's own tokenizer, or resize the model to the added "
      "tokens."
    )
  settings = checkpoint_folders.find_generation_folder(folder)
  notes = stop_tokens.describe_generation(settings, tokenizer)
  if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
    notes.append(
      "add_eos_token of the tokenizer is not used: the template ends answers"
    )
  return notes


def _check_values(config: HfConfig, **supported):
  for name, value in supported.items():
    if config[name] != value:
      raise ValueError(
        f"{name} must be {value!r}, got {config[name]!r}. Give another checkpoint."
      )


def make_llava_config(model: VLM, *, image_token: int) -> HfConfig:
  """Builds the config of a VLM that was not loaded from a checkpoint.

  `image_token` is the id that marks the video in prompts for transformers.
  """
  llm, tower = model.llm, model.vision
  text_type, vision_type = get_model_types(model)
  text = write_fields(DECODER_FAMILIES[text_type].CONFIG, llm)
  text["model_type"] = text_type
  if "head_dim" in text:
    text["head_dim"] = llm.head_dim or llm.embed // llm.heads
  text["rope_parameters"] |= config_keys.write_rope_scaling(llm.rope_scaling)
  if text_type != "llama":
    text["sliding_window"] = llm.window
  if text_type.startswith("qwen"):
    text |= {"use_sliding_window": llm.window is not None, "max_window_layers": 0}
  vision = write_fields(TOWER_FAMILIES[vision_type].CONFIG, tower)
  vision["model_type"] = vision_type
  if vision_type == "siglip_vision_model":
    vision["vision_use_head"] = False
  layers = tower.select_layer
  layers = layers if isinstance(layers, int) else list(layers)
  return {
    **checkpoint_layouts.join_configs(text, vision, layers, model.projector.depth),
    "image_mean": tower.mean,
    "image_std": tower.std,
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": image_token,
    "projector_hidden_act": model.projector.activation,
    "tie_word_embeddings": llm.tied,
  }


def save_checkpoint(
  folder: str | Path,
  params: Params,
  config: HfConfig,
  dtype: str = "float16",
  *,
  train_merger: bool = False,
):
  """Writes a checkpoint for transformers.

  Args:
    folder: Output folder.
    params: Parameters of a VLM without a scalar head. Merge LoRA updates first.
    config: Config from load_checkpoint or make_llava_config.
    dtype: Dtype of the written tensors.
    train_merger: As in load_checkpoint.

  Raises:
    ValueError: The projector does not have 2 layers, or transformers has no such model.
  """
  table = make_table(config, train_merger=train_merger)
  depth = config.get("projector_depth", 2)  # A key of LLaVA.
  if depth != 2:
    raise ValueError(
      f"transformers' LLaVA requires a projector of 2 layers, got {depth}. Export an "
      "adapter, or train another base."
    )
  known = families.drop_original_keys(config)
  own = checkpoint_layouts.OWN_KEYS
  rest = {key: value for key, value in known.items() if key not in own}
  save_tensors(Path(folder), table, params, rest, dtype)


def save_tensors(
  folder: Path, table: NameTable, params: Params, config: HfConfig, dtype: str
) -> None:
  """Writes parameters in `dtype` and their config, by a family's table."""
  target = jnp.dtype(dtype)
  cast = ((name, np.asarray(x, target)) for name, x in convert_to_hf(table, params))
  files.write_folder(folder, cast)
  write_json(folder / "config.json", {**config, "dtype": dtype})
