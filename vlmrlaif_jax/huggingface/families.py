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
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.data.processors.smolvlm import SmolVLMProcessor
from vlmrlaif_jax.huggingface import config_keys, tensor_files
from vlmrlaif_jax.huggingface.config_keys import HfConfig, read_json_object
from vlmrlaif_jax.huggingface.param_mapping import NameTable
from vlmrlaif_jax.huggingface.tensor_files import Tensors
from vlmrlaif_jax.models import qwen2_5_vl, qwen3_vl, smolvlm, vlm


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
  "smolvlm": Family("SmolVLM2", smolvlm, SmolVLMProcessor),
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


def match_config(folder: Path, config: HfConfig, tensors: Tensors) -> HfConfig:
  """Returns the config with tied embeddings if the files lack an output matrix.

  Raises:
    ValueError: The files lack it, although the embeddings are not tied.
  """
  tied = {"tie_word_embeddings": "lm_head.weight" not in tensors}
  is_stated = config["tie_word_embeddings"] or config["text_config"].get(
    "tie_word_embeddings"
  )
  if tied["tie_word_embeddings"] and not is_stated:
    raise ValueError(
      f"{folder} has no tensor lm_head.weight, but tie_word_embeddings is false in its "
      "config.json. Download it again."
    )
  return {**config, **tied, "text_config": {**config["text_config"], **tied}}


def read_processor(folder: Path, config: HfConfig) -> Processor:
  """Loads the processor of a checkpoint, or that of the published checkpoints.

  Without a config of the video processor, that of the image processor applies to both,
  as in transformers.

  Raises:
    ValueError: A file has a setting that is not supported.
  """
  joint = folder / "processor_config.json"
  inner = read_json_object(joint) if joint.exists() else {}
  configs: list[HfConfig] = []
  for kind, name in (
    ("image_processor", "preprocessor_config.json"),
    ("video_processor", "video_preprocessor_config.json"),
  ):
    path = folder / name
    config_of_kind = inner.get(kind)
    if not config_of_kind and path.exists():
      config_of_kind = read_json_object(path)
    configs.append(config_of_kind or (configs[0] if configs else {}))
  family = FAMILIES[config["model_type"]]
  processor, problems = family.processor.from_config(configs[0], configs[1], config)
  if problems:
    raise ValueError(
      f"{folder}: the configs of the processor have settings that are not supported: "
      f"{'; '.join(problems)}. Give another checkpoint."
    )
  return processor
