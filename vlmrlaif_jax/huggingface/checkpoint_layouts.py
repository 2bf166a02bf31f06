"""Detects the layout of a checkpoint folder and opens it in one common form.

`find_layout` is the main function. The common form has the config and the tensor names
of LLaVA in transformers before version 5. `make_llava_table` maps these names.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import numpy as np
from flax.traverse_util import unflatten_dict
from transformers import (
  CONFIG_MAPPING,
  CLIPVisionConfig,
  LlavaConfig,
  PreTrainedConfig,
  SiglipVisionConfig,
)

from vlmrlaif_jax.core import files
from vlmrlaif_jax.huggingface import peft_adapters, published_names
from vlmrlaif_jax.huggingface.tensor_files import Tensor, Tensors
from vlmrlaif_jax.models import clip, llama, projector, qwen2, qwen3, siglip

HfConfig: TypeAlias = dict[str, Any]  # Content of a config.json.

# Model type -> family.
DECODER_FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
TOWER_FAMILIES = {"clip_vision_model": clip, "siglip_vision_model": siglip}

_prefix_table = lambda prefix, hf_prefix, table: {
  f"{prefix}/{path}": (hf_prefix + name, op) for path, (name, op) in table.items()
}

# A param_mapping.NameTable.
PROJECTOR_TABLE = _prefix_table("projector", "multi_modal_projector.", projector.HF)


def make_llava_table(text: str, vision: str) -> dict[str, tuple[str, str]]:
  """Returns the NameTable of a LLaVA.

  Args:
    text: Model type of the language model, a key of DECODER_FAMILIES.
    vision: Model type of the vision tower, a key of TOWER_FAMILIES.
  """
  return {
    **_prefix_table(
      "vision", "vision_tower.vision_model.", TOWER_FAMILIES[vision].HF_VISION
    ),
    **PROJECTOR_TABLE,
    **_prefix_table("llm", "language_model.", DECODER_FAMILIES[text].HF),
  }


_TEXT_NAMES = {"llama": "LLaMA", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Model type of a tower's folder, which may contain a text tower too -> config class.
_TOWER_CONFIGS: dict[str, type[PreTrainedConfig]] = {
  "clip": CLIPVisionConfig,
  "clip_vision_model": CLIPVisionConfig,
  "siglip": SiglipVisionConfig,
  "siglip_vision_model": SiglipVisionConfig,
}
# Name of a tower on the Hub -> its key in clip.VARIANTS.
_TOWER_VARIANTS = {
  "clip-vit-large-patch14-336": "l14_336",
  "clip-vit-large-patch14": "l14",
  "clip-vit-base-patch32": "b32",
}
_DEPTHS = {"linear": 1, "mlp2x_gelu": 2}  # mm_projector_type of the original LLaVA.


def read_fields(fields: Mapping[str, str], config: HfConfig) -> dict[str, Any]:
  """Reads the fields of a module from a config, by its family's CONFIG."""
  get = lambda path: functools.reduce(lambda at, key: at[key], path.split("."), config)
  return {field: get(path) for field, path in fields.items()}


def write_fields(fields: Mapping[str, str], module: nn.Module) -> HfConfig:
  """Returns the config of a module; the inverse of read_fields."""
  values = {path: module.__dict__[field] for field, path in fields.items()}
  return unflatten_dict(values, sep=".")


class CheckpointLayout(NamedTuple):
  """An opened checkpoint in the common form; its tensors are not read yet."""

  name: str  # Name of the layout.
  config: HfConfig  # Config of a LlavaConfig, plus "projector_depth".
  tensors: Tensors  # Name, as in make_llava_table -> tensor.
  notes: tuple[str, ...] = ()  # Unused, initialized and merged tensors, for the log.


def find_layout(folder: Path, *, tower: str = "") -> CheckpointLayout:
  """Detects the layout of a checkpoint from its files and opens it.

  Args:
    folder: Folder of the checkpoint.
    tower: Folder of a CLIP or SigLIP, for a checkpoint without a tower.

  Raises:
    FileNotFoundError: A folder that the config names does not exist.
    ValueError: The layout is not supported.
  """
  if _find_own_adapter(folder) is not None:
    return _open_adapted(folder, tower)
  config = files.read_json(folder / "config.json")
  model_type = config.get("model_type")
  if "mm_vision_tower" in config:
    tensors, notes = published_names.open_tensors(folder)
    return _open_original(folder, config, tensors, notes, tower)
  if model_type == "llava":
    tensors, notes = published_names.open_tensors(folder)
    full = _match_config(read_llava_config(folder), tensors)
    return CheckpointLayout("Hugging Face LLaVA", full, tensors, notes)
  if model_type in DECODER_FAMILIES:
    return _open_plain(folder, config, tower)
  raise ValueError(_describe_unsupported(folder, model_type))


def read_llava_config(folder: Path) -> HfConfig:
  """Reads the config of a Hugging Face LLaVA, for which no weights are required.

  Raises:
    ValueError: The config is that of another model.
  """
  model_type = files.read_json(folder / "config.json").get("model_type")
  if model_type != "llava":
    raise ValueError(_describe_unsupported(folder, model_type))
  return LlavaConfig.from_pretrained(folder).to_dict() | {"projector_depth": 2}


def _describe_unsupported(folder: Path, model_type: str | None) -> str:
  return (
    f'{folder / "config.json"}: model_type must be "llava", "llava_llama" or one of '
    f"{sorted(DECODER_FAMILIES)}, with weights next to it; got {model_type!r}. Give "
    "another checkpoint."
  )


def _find_own_adapter(folder: Path) -> Path | None:
  """Finds the adapter of a folder; below it only if the folder has no weights."""
  weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
  if weights and not (folder / peft_adapters.ADAPTER_CONFIG).exists():
    return None
  return peft_adapters.find_adapter(folder)


def find_tokenizer_folder(folder: Path) -> Path:
  """Finds the folder of a checkpoint's tokenizer: its own, or an adapter's base.

  Raises:
    FileNotFoundError: The base of the adapter does not exist.
  """
  names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
  if any((folder / name).exists() for name in names):
    return folder
  adapter = _find_own_adapter(folder)
  if adapter is None:
    return folder
  config = files.read_json(adapter / peft_adapters.ADAPTER_CONFIG)
  return find_tokenizer_folder(
    _find_base(folder, config.get("base_model_name_or_path") or "")
  )


def _find_base(folder: Path, name: str) -> Path:
  """Finds the folder of an adapter's base."""
  base = _find_folder(folder, name)
  if base is None:
    raise FileNotFoundError(
      f"{folder} contains an adapter of {name!r}, which is not a local folder. Put the "
      "base there, or set base_model_name_or_path in "
      f"{peft_adapters.ADAPTER_CONFIG} to its path."
    )
  return base


def _open_adapted(folder: Path, tower: str) -> CheckpointLayout:
  """Opens an adapter, its base, and the tensors that were trained whole."""
  adapter = peft_adapters.read_adapter(folder, published_names.rename_published)
  base = _find_base(folder, adapter.base)
  config = files.read_json(folder / "config.json", default={})
  if "mm_vision_tower" in config:
    tensors, notes = published_names.open_tensors(base)
    layout = _open_original(folder, config, tensors | adapter.rest, notes, tower)
  else:
    layout = find_layout(base, tower=tower)
  rest = published_names.format_counts(name.split(".")[0] for name in adapter.rest)
  return layout._replace(
    name=f"LoRA adapter on {layout.name}",
    tensors=peft_adapters.fold_adapter(layout.tensors, adapter),
    notes=(
      *layout.notes,
      f"merged: rank {adapter.rank} updates of {len(adapter.factors)} matrices",
      *((f"replaced: {rest}",) if adapter.rest else ()),
    ),
  )


def _open_original(
  folder: Path, config: HfConfig, tensors: Tensors, notes: tuple[str, ...], tower: str
) -> CheckpointLayout:
  """Opens the layout of the LLaVA repository: a LLaMA whose config names a tower."""
  depth = config.get("mm_projector_type", "linear")
  if depth not in _DEPTHS:
    raise ValueError(
      f"mm_projector_type must be one of {sorted(_DEPTHS)}, got {depth!r}"
    )
  for key, value in {
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
  }.items():
    if config.get(key, value) != value:
      raise ValueError(f"{key} must be {value!r}, got {config[key]!r}")
  is_inside = any(name.startswith("vision_tower.") for name in tensors)
  tower = tower or config["mm_vision_tower"]
  path = _find_folder(folder, tower)
  if path is not None:
    vision = _read_tower_config(path)
    if not is_inside:
      tower_tensors, tower_notes = _open_tower(path)
      tensors, notes = {**tensors, **tower_tensors}, (*notes, *tower_notes)
  elif is_inside and Path(tower).name in _TOWER_VARIANTS:
    module = clip.VisionTower(**clip.VARIANTS[_TOWER_VARIANTS[Path(tower).name]])
    vision = CLIPVisionConfig(**write_fields(clip.CONFIG, module)).to_dict()
  else:
    raise FileNotFoundError(
      f"{folder} has the vision tower {tower!r}, which is not a local folder. Put the "
      "CLIP folder there, or set --config.model.tower to its path."
    )
  if config.get("mm_hidden_size", vision["hidden_size"]) != vision["hidden_size"]:
    raise ValueError(
      f"mm_hidden_size is {config['mm_hidden_size']}, but the vision tower {tower} has "
      f"{vision['hidden_size']} channels. Give the tower of the config."
    )
  layer = config.get("mm_vision_select_layer", -2)
  text = {**config, "model_type": "llama"}
  full = _match_config(join_configs(text, vision, layer, _DEPTHS[depth]), tensors)
  where = "inside" if is_inside else f"from {path}"
  return CheckpointLayout(
    "original LLaVA", full, tensors, (f"vision tower {where}", *notes)
  )


def _open_plain(folder: Path, config: HfConfig, tower: str) -> CheckpointLayout:
  """Opens a language model and a tower, and adds a random projector."""
  path = _find_folder(folder, tower) if tower else None
  if path is None:
    raise FileNotFoundError(
      f"{folder} is a language model without a vision tower, and model.tower={tower!r} "
      "is not a folder. Set --config.model.tower to the folder of a CLIP or SigLIP."
    )
  tensors, notes = published_names.open_tensors(folder)
  tower_tensors, tower_notes = _open_tower(path)
  full = _match_config(join_configs(config, _read_tower_config(path), -2, 2), tensors)
  notes = (f"vision tower from {path}", "random projector", *notes, *tower_notes)
  name = f"plain {_TEXT_NAMES[config['model_type']]}"
  return CheckpointLayout(
    name, full, {**tensors, **tower_tensors, **_make_random_projector(full)}, notes
  )


def _make_random_projector(config: HfConfig) -> dict[str, np.ndarray]:
  """Samples weights that preserve the variance of activations; biases are 0."""
  channels = config["vision_config"]["hidden_size"]
  embed = config["text_config"]["hidden_size"]
  rng, params = np.random.default_rng(0), {}
  for layer, inputs in (("linear_1", channels), ("linear_2", embed)):
    name = f"multi_modal_projector.{layer}"
    weight = rng.normal(scale=inputs**-0.5, size=(embed, inputs))
    params[f"{name}.weight"] = weight.astype(np.float32)
    params[f"{name}.bias"] = np.zeros(embed, np.float32)
  return params


def join_configs(text: HfConfig, vision: HfConfig, layer: int, depth: int) -> HfConfig:
  """Builds the config of a LLaVA from those of a language model and a tower.

  Args:
    text: Config of the language model.
    vision: Config of the tower.
    layer: Layer of the tower whose tokens are read; -2 is the last but one.
    depth: Number of linear layers of the projector.
  """
  side = vision["image_size"] // vision["patch_size"]
  is_clip = vision["model_type"] == "clip_vision_model"
  full = LlavaConfig(
    text_config=CONFIG_MAPPING[text["model_type"]].from_dict(text),
    vision_config=vision,
    # The first id after the vocabulary; see convert.add_image_token.
    image_token_index=text["vocab_size"],
    image_seq_length=side**2,
    vision_feature_layer=layer,
    # "default" drops the class token, which SigLIP does not have.
    vision_feature_select_strategy="default" if is_clip else "full",
    projector_hidden_act="gelu",
  )
  return {**full.to_dict(), "projector_depth": depth}


def _match_config(config: HfConfig, tensors: Tensors) -> HfConfig:
  """Makes a config consistent with the tensors of the files.

  The pooling head is turned off. The embeddings are tied only if the files lack an
  output matrix: transformers also ignores `tie_word_embeddings` if they have one.

  Raises:
    ValueError: The family of the language model or the tower is not supported.
  """
  for part, known in (
    ("text_config", DECODER_FAMILIES),
    ("vision_config", TOWER_FAMILIES),
  ):
    if (model_type := config[part]["model_type"]) not in known:
      raise ValueError(
        f"{part}.model_type must be one of {sorted(known)}, got {model_type!r}"
      )
  text, vision = config["text_config"], config["vision_config"]
  is_tied = config["tie_word_embeddings"] or text["tie_word_embeddings"]
  tied = {
    "tie_word_embeddings": is_tied and "language_model.lm_head.weight" not in tensors
  }
  if vision["model_type"] == "siglip_vision_model":
    vision = {**vision, "vision_use_head": False}
  return {**config, **tied, "text_config": {**text, **tied}, "vision_config": vision}


# Vision towers.


def _find_folder(folder: Path, name: str) -> Path | None:
  """Finds a folder by its path, inside the checkpoint's folder, or next to it."""
  for path in (Path(name), folder / name, folder.parent / Path(name).name):
    if name and (path / "config.json").exists():
      return path
  return None


def _read_tower_config(folder: Path) -> HfConfig:
  model_type = files.read_json(folder / "config.json").get("model_type")
  if model_type not in _TOWER_CONFIGS:
    raise ValueError(
      f"the model_type of the vision tower {folder} must be one of "
      f"{sorted(_TOWER_CONFIGS)}, got {model_type!r}"
    )
  return _TOWER_CONFIGS[model_type].from_pretrained(folder).to_dict()


def _open_tower(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
  """Opens the tensors of a vision tower; also returns notes about unused ones."""
  rename = lambda name: re.sub(r"^(vision_model\.)?", "vision_model.", name)
  tensors, notes = published_names.open_tensors(folder, rename=lambda name: name)
  tensors, more = published_names.drop_unused(
    published_names.NOT_TOWER, folder, tensors
  )
  return {f"vision_tower.{rename(n)}": x for n, x in tensors.items()}, (*notes, *more)
