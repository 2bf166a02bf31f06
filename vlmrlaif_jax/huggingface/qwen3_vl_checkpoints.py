"""Reads Hugging Face checkpoints of Qwen3-VL: configs, names of tensors, processor."""

from pathlib import Path
from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig

from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.data.processors.sizes import FRAMES
from vlmrlaif_jax.huggingface import config_keys, tensor_files
from vlmrlaif_jax.huggingface.checkpoint_layouts import CheckpointLayout, read_fields
from vlmrlaif_jax.huggingface.config_keys import HfConfig, read_json_object
from vlmrlaif_jax.huggingface.param_mapping import NameTable
from vlmrlaif_jax.models import qwen3_vl
from vlmrlaif_jax.models.clip import CLIP_ACTIVATIONS
from vlmrlaif_jax.models.decoders import qwen3
from vlmrlaif_jax.models.layers import DTypes
from vlmrlaif_jax.models.vlm import VLM

MODEL_TYPE = "qwen3_vl"

# Sources of all parameters.
TABLE: NameTable = {
  **{
    f"vision/{path}": (f"model.visual.{name}", op)
    for path, (name, op) in qwen3_vl.HF_VISION.items()
  },
  **{
    f"llm/{path}": (name.replace("model.", "model.language_model.", 1), op)
    for path, (name, op) in qwen3.HF.items()
  },
}
_PARTS = {"text_config": Qwen3VLTextConfig, "vision_config": Qwen3VLVisionConfig}
# Values that the layers require, by part of the config.
_REQUIRED: dict[str, dict[str, Any]] = {
  "text_config": dict(hidden_act="silu", attention_bias=False),
  "vision_config": dict(in_channels=3, temporal_patch_size=FRAMES),
}


def open_checkpoint(folder: Path) -> CheckpointLayout:
  """Opens a checkpoint, whose tensors are not read yet.

  Raises:
    ValueError: The config has a value that the layers do not support.
  """
  path = folder / "config.json"
  raw = read_json_object(path)
  config = config_keys.make_config(Qwen3VLConfig, raw, path)
  unused = config_keys.check_keys(path, raw, Qwen3VLConfig)
  for part, kind in _PARTS.items():
    unused += config_keys.check_keys(path, raw.get(part) or {}, kind, part=f"{part}.")
  tensors = tensor_files.open_folder(folder)
  tied = {"tie_word_embeddings": "lm_head.weight" not in tensors}
  if tied["tie_word_embeddings"] and not config["tie_word_embeddings"]:
    raise ValueError(
      f"{folder} has no tensor lm_head.weight, but tie_word_embeddings is false in its "
      "config.json. Download it again."
    )
  config = {**config, **tied, "text_config": {**config["text_config"], **tied}}
  _check_values(config, path)
  notes = config_keys.describe_unused(path, unused)
  return CheckpointLayout("Hugging Face Qwen3-VL", config, tensors, tuple(notes))


def _check_values(config: HfConfig, path: Path) -> None:
  """Raises ValueError if the layers do not support a value."""
  for part, values in _REQUIRED.items():
    for name, value in values.items():
      if config[part][name] != value:
        raise ValueError(
          f"{path}: {part}.{name} must be {value!r}, got {config[part][name]!r}. Give "
          "another checkpoint."
        )
  text, vision = config["text_config"], config["vision_config"]
  if vision["hidden_act"] not in CLIP_ACTIVATIONS:
    raise ValueError(
      f"{path}: vision_config.hidden_act must be one of {sorted(CLIP_ACTIVATIONS)}, "
      f"got {vision['hidden_act']!r}. Give another checkpoint."
    )
  rope = text["rope_parameters"]
  sections = rope.get("mrope_section", qwen3_vl.ROPE_SECTIONS)
  is_default = rope.get("rope_type", "default") == "default"
  if not is_default or 2 * sum(sections) != text["head_dim"]:
    raise ValueError(
      f"{path}: text_config.rope_parameters must have the rope_type 'default' and an "
      f"mrope_section whose sum is half of head_dim={text['head_dim']}, got {rope}. "
      "Give another checkpoint."
    )
  if vision["out_hidden_size"] != text["hidden_size"]:
    raise ValueError(
      f"{path}: vision_config.out_hidden_size={vision['out_hidden_size']} must be "
      f"text_config.hidden_size={text['hidden_size']}. Give the config of the weights."
    )


def make_model(config: HfConfig, dtype: str) -> VLM:
  """Builds the model of a config."""
  text, vision = config["text_config"], config["vision_config"]
  types = DTypes(dtype=dtype, param_dtype=dtype)
  fields = read_fields(qwen3_vl.CONFIG, vision)
  sections = text["rope_parameters"].get("mrope_section", qwen3_vl.ROPE_SECTIONS)
  return VLM(
    vision=qwen3_vl.Model(**{**fields, "taps": tuple(fields["taps"])}, **types),
    projector=qwen3_vl.Connector(text["hidden_size"]),
    llm=qwen3.Model(
      **read_fields(qwen3.CONFIG, text),
      mrope=tuple(sections),
      mrope_interleaved=True,
      **types,
    ),
  )


def read_processor(folder: Path) -> Qwen3VLProcessor:
  """Loads the processor of a checkpoint, or that of the published checkpoints.

  Raises:
    ValueError: A file has a setting that is not supported.
  """
  configs = {}
  joint = folder / "processor_config.json"
  inner = read_json_object(joint) if joint.exists() else {}
  for kind, name in (
    ("image_processor", "preprocessor_config.json"),
    ("video_processor", "video_preprocessor_config.json"),
  ):
    path = folder / name
    configs[kind] = inner.get(kind) or (read_json_object(path) if path.exists() else {})
  processor, problems = Qwen3VLProcessor.from_config(*configs.values())
  if problems:
    raise ValueError(
      f"{folder}: the configs of the processor have settings that are not supported: "
      f"{'; '.join(problems)}. Give another checkpoint."
    )
  return processor
