"""Model families other than LLaVA, by the model_type of their config.json.

A family is a module of models/, a module of data/processors/, and an entry here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from transformers import CONFIG_MAPPING, AutoConfig

from vlmrlaif_jax.data.processors.interface import Processor
from vlmrlaif_jax.data.processors.llava_onevision import LlavaOnevisionProcessor
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.data.processors.smolvlm import SmolVLMProcessor
from vlmrlaif_jax.huggingface import config_keys, tensor_files, vision_towers
from vlmrlaif_jax.huggingface.checkpoint_folders import find_folder
from vlmrlaif_jax.huggingface.config_keys import HfConfig, read_json_object
from vlmrlaif_jax.huggingface.param_mapping import NameTable
from vlmrlaif_jax.huggingface.tensor_files import Tensors
from vlmrlaif_jax.models import (
  llava_onevision,
  qwen2_5_vl,
  qwen3_vl,
  siglip,
  smolvlm,
  vlm,
)
from vlmrlaif_jax.models.decoder import Decoder
from vlmrlaif_jax.models.layers import write_fields


class ProcessorClass(Protocol):
  """A class of processors."""

  @classmethod
  def from_config(
    cls, image: Mapping[str, Any], video: Mapping[str, Any], config: HfConfig
  ) -> tuple[Processor, list[str]]:
    """Returns the processor of a checkpoint, and what is not supported of it.

    Args:
      image: the Hugging Face config of the image processor.
      video: that of the video processor.
      config: the config.json.
    """
    ...


class Family(NamedTuple):
  """A family of published models."""

  name: str
  # It has CONFIG, HF, RENAMES, MERGERS, REQUIRED, SHARDING, VARIANTS and LLM_VARIANTS,
  # and make_model; see models/qwen3_vl.py.
  models: ModuleType
  processor: ProcessorClass


FAMILIES = {
  "qwen3_vl": Family("Qwen3-VL", qwen3_vl, Qwen3VLProcessor),
  "qwen2_5_vl": Family("Qwen2.5-VL", qwen2_5_vl, Qwen25VLProcessor),
  "llava_onevision": Family(
    "LLaVA-OneVision", llava_onevision, LlavaOnevisionProcessor
  ),
  "smolvlm": Family("SmolVLM2", smolvlm, SmolVLMProcessor),
}

# Keys of the processors in a joint config, and the files that they have without one.
JOINT_CONFIG = "processor_config.json"
PROCESSOR_CONFIGS = {
  "image_processor": "preprocessor_config.json",
  "video_processor": "video_preprocessor_config.json",
}

# Shardings of the parameters of all families over the mesh.
SHARDING = tuple(
  dict.fromkeys(
    (
      *vlm.SHARDING,
      *(rule for family in FAMILIES.values() for rule in family.models.SHARDING),
    )
  )
)


def make_family_table(config: HfConfig, *, train_merger: bool) -> NameTable:
  """Returns the sources of all parameters, as transformers names them."""
  models = FAMILIES[config["model_type"]].models
  if not train_merger:
    return models.HF
  moved = re.compile(rf"^vision/(?=(?:{'|'.join(models.MERGERS)})(?:/|$))")
  return {moved.sub("projector/", path): source for path, source in models.HF.items()}


def rename_tensor(model_type: str, name: str) -> str:
  """Maps a published name of a tensor to its name in the family's table."""
  for pattern, replacement in FAMILIES[model_type].models.RENAMES:
    name = re.sub(pattern, replacement, name)
  return name


def open_family_tensors(folder: Path, model_type: str) -> Tensors:
  """Opens the tensors of a folder, by their names in the family's table."""
  tensors = tensor_files.open_folder(folder)
  return {rename_tensor(model_type, name): x for name, x in tensors.items()}


def read_family_config(folder: Path) -> tuple[HfConfig, list[str]]:
  """Reads the config of a family, for which no weights are required.

  Returns:
    The config with the defaults of transformers, and notes about unused keys.

  Raises:
    ValueError: The config has a value that the layers do not support.
  """
  path = folder / "config.json"
  raw = read_json_object(path)
  family = FAMILIES[raw["model_type"]]
  kind = CONFIG_MAPPING[raw["model_type"]]
  config = config_keys.make_config(kind, raw, path)
  parts = {
    part: CONFIG_MAPPING[config[part]["model_type"]]
    if kind.sub_configs[part] is AutoConfig
    else kind.sub_configs[part]
    for part in ("text_config", "vision_config")
  }
  # Some published configs have the keys of the language model at the top.
  more = () if "text_config" in raw else parts["text_config"]().to_dict()
  unused = config_keys.check_keys(path, raw, kind, more)
  for part, each in parts.items():
    inner = raw.get(part) or {}
    unused += config_keys.check_keys(path, inner, each, part=f"{part}.")
  config_keys.check_sizes(config["text_config"], config["vision_config"])
  for part, values in family.models.REQUIRED.items():
    for name, value in values.items():
      if config[part][name] != value:
        raise ValueError(
          f"{path}: {part}.{name} must be {value!r}, got {config[part][name]!r}. Give "
          "another checkpoint."
        )
  return config, config_keys.describe_unused(path, unused)


def make_published_config(model_type: str, size: str) -> HfConfig:
  """Returns the config of a published size, a key of the family's LLM_VARIANTS."""
  models = FAMILIES[model_type].models
  decoder = models.DECODER.Model(**models.LLM_VARIANTS[size])
  return make_family_config(model_type, decoder, models.Model(**models.VARIANTS[size]))


def make_family_config(model_type: str, decoder: Decoder, tower: Any) -> HfConfig:
  """Returns the config of a language model and a vision tower of a family.

  Args:
    model_type: a key of FAMILIES.
    decoder: a Decoder of the family. With several position axes, its heads are as wide
      as those of published sizes.
    tower: a tower of the family.
  """
  models = FAMILIES[model_type].models
  text = write_fields(models.DECODER.CONFIG, decoder)
  text["model_type"] = models.DECODER.__name__.rpartition(".")[2]
  vision = write_fields(models.CONFIG, tower)
  kind = CONFIG_MAPPING[model_type]
  if kind.sub_configs["vision_config"] is AutoConfig:
    vision["model_type"] = "siglip_vision_model"
  if models.ROPE_SECTIONS:
    text["rope_parameters"] |= {"mrope_section": list(models.ROPE_SECTIONS)}
  values = {
    "text_config": text,
    "vision_config": vision,
    "tie_word_embeddings": decoder.tied,
    **write_fields(models.TOP_CONFIG, tower),
  }
  return config_keys.make_config(kind, values, Path(model_type))


def match_config(folder: Path, config: HfConfig, tensors: Tensors) -> HfConfig:
  """Returns the config with tied embeddings if the files lack an output matrix.

  Raises:
    ValueError: The files lack it, although the embeddings are not tied.
  """
  name, _ = FAMILIES[config["model_type"]].models.HF["llm/lm_head/kernel"]
  tied = {"tie_word_embeddings": name not in tensors}
  is_stated = config["tie_word_embeddings"] or config["text_config"].get(
    "tie_word_embeddings"
  )
  if tied["tie_word_embeddings"] and not is_stated:
    raise ValueError(
      f"{folder} has no tensor {name}, but tie_word_embeddings is false in its "
      "config.json. Download it again."
    )
  return {**config, **tied, "text_config": {**config["text_config"], **tied}}


def read_processor_configs(folder: Path) -> list[HfConfig]:
  """Returns the configs of the image and of the video processor of a checkpoint.

  Without a config of the video processor, that of the image processor applies to both,
  as in transformers.
  """
  joint = folder / JOINT_CONFIG
  inner = read_json_object(joint) if joint.exists() else {}
  configs: list[HfConfig] = []
  for kind, name in PROCESSOR_CONFIGS.items():
    path = folder / name
    config_of_kind = inner.get(kind)
    if not config_of_kind and path.exists():
      config_of_kind = read_json_object(path)
    configs.append(config_of_kind or (configs[0] if configs else {}))
  return configs


def read_processor(folder: Path, config: HfConfig) -> Processor:
  """Loads the processor of a checkpoint, or that of the published checkpoints.

  Raises:
    ValueError: A file has a setting that is not supported.
  """
  image, video = read_processor_configs(folder)
  family = FAMILIES[config["model_type"]]
  processor, problems = family.processor.from_config(image, video, config)
  if problems:
    raise ValueError(
      f"{folder}: the configs of the processor have settings that are not supported: "
      f"{'; '.join(problems)}. Give another checkpoint."
    )
  return processor


# The LLaVA repository's layout of LLaVA-OneVision and LLaVA-Video.

# Keys that transformers does not have -> the value that its model equals.
_ORIGINAL_KEYS = {
  "mm_newline_position": "one_token",
  "mm_spatial_pool_mode": "bilinear",
  "frames_upbound": None,
  "add_time_instruction": False,
}
# Keys with one supported value, unless they are unset.
_ORIGINAL_REQUIRED = {
  "mm_projector_type": "mlp2x_gelu",
  "mm_vision_select_feature": "patch",
  "mm_pooling_position": "after",
  "mm_spatial_pool_stride": 2,
  "mm_use_im_start_end": False,
  "mm_use_im_patch_token": False,
  "add_faster_video": False,
}
_TOWER = "siglip-so400m-patch14-384"


def is_original_onevision(config: HfConfig) -> bool:
  """Returns whether a config of the LLaVA repository is that of a LLaVA-OneVision."""
  is_qwen = config.get("model_type") == "llava_qwen"
  return is_qwen and config.get("mm_patch_merge_type") == "spatial_unpad"


def convert_original(
  folder: Path, raw: HfConfig, tensors: Tensors, tower: str
) -> tuple[HfConfig, tuple[str, ...]]:
  """Converts a config of the LLaVA repository to that of transformers.

  Args:
    folder: Folder of the checkpoint, whose files contain the vision tower.
    raw: The content of its config.json.
    tensors: Its tensors, by their names in the family's table.
    tower: Folder of the vision tower, for its config; "" for that of the config.

  Returns:
    The config with the keys of _ORIGINAL_KEYS, and notes about unused keys.

  Raises:
    ValueError: The config has a value that the layers do not support.
    FileNotFoundError: The config of the vision tower does not exist.
  """
  path = folder / "config.json"
  for name, value in _ORIGINAL_REQUIRED.items():
    if raw.get(name) not in (None, value):
      raise ValueError(
        f"{path}: {name} must be {value!r}, got {raw[name]!r}. Give another checkpoint."
      )
  kind = CONFIG_MAPPING["qwen2"]
  text = config_keys.make_config(kind, {**raw, "model_type": "qwen2"}, path)
  known = {*kind().to_dict(), *text["rope_parameters"], "rope_parameters"}
  read = {key: x for key, x in raw.items() if key not in _ORIGINAL_REQUIRED}
  own = {key: read.pop(key) for key in _ORIGINAL_KEYS if read.get(key) is not None}
  notes = config_keys.check_original_keys(path, read, "qwen2", anyres=True)
  values = {
    "text_config": {key: x for key, x in text.items() if key in known},
    "vision_config": _read_original_tower(folder, str(raw["mm_vision_tower"]), tower),
    "vision_aspect_ratio": raw.get("image_aspect_ratio"),
    "tie_word_embeddings": text["tie_word_embeddings"],
  }
  if isinstance(pinpoints := raw.get("image_grid_pinpoints"), list):
    values["image_grid_pinpoints"] = [[high, wide] for wide, high in pinpoints]
  full = config_keys.make_config(CONFIG_MAPPING["llava_onevision"], values, path)
  config_keys.check_sizes(full["text_config"], full["vision_config"])
  return {**match_config(folder, full, tensors), **own}, tuple(notes)


def _read_original_tower(folder: Path, name: str, tower: str) -> HfConfig:
  """Returns the config of a SigLIP without its last layer, which is not used."""
  place = find_folder(folder, tower or name)
  if place is not None:
    vision, *_ = vision_towers.read_tower_config(place)
  elif name.endswith(_TOWER):
    model = siglip.Model(**siglip.VARIANTS["so400m_384"])
    vision = {"model_type": "siglip_vision_model"}
    vision |= write_fields(siglip.CONFIG, model)
  else:
    raise FileNotFoundError(
      f"{folder} has the vision tower {name!r}, which is not a local folder. Put its "
      "config.json there, or set --config.model.tower to its path."
    )
  layers = vision["num_hidden_layers"] - 1
  return {**vision, "num_hidden_layers": layers, "vision_use_head": False}


def drop_original_keys(config: HfConfig) -> HfConfig:
  """Returns a config without the keys that transformers does not have.

  Raises:
    ValueError: A model of transformers would differ.
  """
  for key, value in _ORIGINAL_KEYS.items():
    if value is not None and config.get(key, value) != value:
      raise ValueError(
        f"{key} is {config[key]!r}, which no model of transformers has, so the policy "
        "cannot be exported. Use launch/chat.py --workdir."
      )
  return {key: value for key, value in config.items() if key not in _ORIGINAL_KEYS}
