"""Checks every key of a checkpoint's config.json.

A key is read, or must have one value, or cannot change a result, or is listed in a note
as unused. A key that would change the result of the supported layers is an error.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, LlavaConfig, PreTrainedConfig

from vlmrlaif_jax.core import files
from vlmrlaif_jax.models.layers import RopeScaling

HfConfig: TypeAlias = dict[str, Any]  # Content of a config.json.

# Keys of any config that cannot change logits. transformers 4 wrote most of them.
_HARMLESS = set(
  "_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled "
  "attention_dropout attn_implementation bad_words_ids begin_suppress_tokens "
  "bos_token_id chunk_size_feed_forward cls_token_id cross_attention_hidden_size "
  "decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping "
  "encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty "
  "finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label "
  "ignore_index image_token_id initializer_factor initializer_range is_decoder "
  "label2id length_penalty max_length max_new_tokens max_position_embeddings "
  "max_sequence_length min_length no_repeat_ngram_size num_beam_groups num_beams "
  "num_return_sequences output_attentions output_hidden_states output_scores "
  "pad_token_id prefix pretraining_tp projection_dim remove_invalid_values "
  "repetition_penalty return_dict return_dict_in_generate sep_token_id "
  "suppress_tokens task_specific_params temperature tf_legacy_loss "
  "tie_word_embeddings "
  "tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript "
  "transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 "
  "use_cache vision_use_head vocab_size".split()
)
# Keys of the original LLaVA that are read or concern its training.
_ORIGINAL = set(
  "freeze_mm_mlp_adapter image_aspect_ratio image_crop_resolution "
  "image_grid_pinpoints image_split_resolution mm_hidden_size mm_patch_merge_type "
  "mm_projector_lr mm_projector_type mm_resampler_type mm_tunable_parts "
  "mm_use_im_patch_token mm_use_im_start_end mm_vision_select_feature "
  "mm_vision_select_layer mm_vision_tower mm_vision_tower_lr "
  "tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter "
  "tune_mm_vision_resampler unfreeze_mm_vision_tower use_mm_proj "
  "vision_tower_pretrained".split()
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")  # Of all versions.
_OTHER_MODEL = "Give a checkpoint without it."
# Keys that must be unset or false, in any config -> remedy.
_REFUSED = {
  "quantization_config": "Give the 16-bit weights, and set --config.model.quant.",
  "compression_config": "Give the 16-bit weights, and set --config.model.quant.",
  **dict.fromkeys(
    (
      "add_cross_attention attention_chunk_size attention_multiplier "
      "attn_logit_softcapping clip_qkv embedding_multiplier final_logit_softcapping "
      "is_encoder_decoder logit_scale logits_scaling mm_newline_position "
      "mm_resampler_type mm_spatial_pool_stride n_routed_experts no_rope_layers "
      "num_experts num_local_experts pruned_heads query_pre_attn_scalar "
      "residual_multiplier s2"
    ).split(),
    _OTHER_MODEL,
  ),
}
# Largest supported sizes, so that a damaged config is an error before memory is used.
_LIMITS = {
  "hidden_size": 65_536,
  "intermediate_size": 524_288,
  "num_hidden_layers": 512,
  "num_attention_heads": 1024,
  "num_heads": 1024,
  "depth": 512,
  "num_key_value_heads": 1024,
  "vocab_size": 4_194_304,
  "head_dim": 4096,
  "image_size": 4096,
  "patch_size": 4096,
  "num_channels": 64,
  "num_position_embeddings": 1_048_576,
  "out_hidden_size": 65_536,
  "spatial_merge_size": 64,
  "temporal_patch_size": 64,
}


def read_json_object(path: Path) -> HfConfig:
  """Reads a JSON file that contains an object.

  Raises:
    FileNotFoundError: The file does not exist.
    ValueError: The file is not JSON, or contains another value.
  """
  config = files.read_json(path)
  if not isinstance(config, dict):
    raise ValueError(
      f"{path} must contain a JSON object, got {type(config).__name__}. Download it "
      "again."
    )
  if not isinstance(config.get("model_type", ""), str | None):
    raise ValueError(
      f"{path}: model_type must be a string, got {config['model_type']!r}. Download it "
      "again."
    )
  return config


def make_config(
  kind: type[PreTrainedConfig], values: Mapping[str, Any], path: Path
) -> HfConfig:
  """Builds a config of transformers, which adds defaults and checks types.

  Raises:
    ValueError: A value has the wrong type. The message names the file.
  """
  try:
    return kind.from_dict(dict(values)).to_dict()
  except (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ZeroDivisionError,
  ) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path}: {reason}. Correct the value.") from error


def check_keys(
  path: Path,
  raw: Mapping[str, Any],
  kind: type[PreTrainedConfig],
  more: Collection[str] = (),
  part: str = "",
) -> list[str]:
  """Checks the keys of a config as its file has it.

  Args:
    path: The file, for messages.
    raw: The config, without the defaults of transformers.
    kind: Config class of transformers, whose keys the caller reads or checks.
    more: Other keys that the caller reads or checks.
    part: Prefix of the keys in messages, such as "text_config.".

  Returns:
    The keys that are not used, with their prefix.

  Raises:
    ValueError: A key that would change the result is set.
  """
  for key, remedy in _REFUSED.items():
    if raw.get(key):
      value = str(raw[key])[:60]
      raise ValueError(f"{path}: {part}{key}={value} is not supported. {remedy}")
  own = (field.name for field in dataclasses.fields(kind))
  known = {*own, *more, *_ROPE, *_HARMLESS, *PreTrainedConfig().to_dict()}
  unset: tuple[Any, ...] = (None, False, "", [], {})
  return [part + key for key in raw if key not in known and raw[key] not in unset]


def check_original_keys(
  path: Path, raw: Mapping[str, Any], text: str, *, anyres: bool = False
) -> list[str]:
  """Checks the keys of an original LLaVA, whose config is that of its language model.

  Args:
    path: The file, for messages.
    raw: Its content.
    text: Model type of the language model.
    anyres: Whether image_aspect_ratio is used.

  Returns:
    Notes about keys that are not used.
  """
  unused = check_keys(path, raw, CONFIG_MAPPING[text], _ORIGINAL)
  notes = describe_unused(path, unused)
  ratio = raw.get("image_aspect_ratio")
  if ratio != "pad" and not anyres:
    notes.append(
      f"image_aspect_ratio={ratio!r} is not used: frames are padded to a square"
    )
  return notes


def check_nested_keys(path: Path, raw: Mapping[str, Any], full: HfConfig) -> list[str]:
  """Checks the keys of a Hugging Face LLaVA and of its two inner configs.

  Args:
    path: The file, for messages.
    raw: Its content.
    full: The same with the defaults of transformers.

  Returns:
    Notes about keys that are not used.
  """
  unused = check_keys(path, raw, LlavaConfig)
  for part in ("text_config", "vision_config"):
    kind = CONFIG_MAPPING[full[part]["model_type"]]
    unused += check_keys(path, raw.get(part) or {}, kind, part=f"{part}.")
  return describe_unused(path, unused)


def describe_unused(path: Path, unused: list[str]) -> list[str]:
  """Returns a note that lists unused keys, or no note."""
  return [f"{path.name}: keys that are not used: {', '.join(unused)}"] if unused else []


def check_sizes(text: HfConfig, vision: HfConfig) -> None:
  """Checks the sizes of both parts before anything is allocated.

  Raises:
    ValueError: A size is not a positive integer, is too large, or does not divide
      another one.
  """
  for name, part in (("text_config", text), ("vision_config", vision)):
    for key, limit in _LIMITS.items():
      value = part.get(key)
      if value is None and key in ("head_dim", "num_key_value_heads", "vocab_size"):
        continue
      is_size = isinstance(value, int) and not isinstance(value, bool)
      if key in part and not (is_size and value in range(1, limit + 1)):
        raise ValueError(
          f"{name}.{key} must be an integer from 1 to {limit}, got {value!r}. Give "
          "the config.json of the weights."
        )
  heads = "num_attention_heads" if "num_attention_heads" in vision else "num_heads"
  for big, small, part in (
    ("num_attention_heads", "num_key_value_heads", text),
    ("hidden_size", heads, vision),
  ):
    if part[big] % part[small]:
      raise ValueError(
        f"{big}={part[big]} must be a multiple of {small}={part[small]}. Give the "
        "config.json of the weights."
      )
  head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
  if not head_dim or head_dim % 2:
    raise ValueError(
      f"the width of an attention head must be even, got {head_dim} (head_dim, or "
      "hidden_size / num_attention_heads). Give the config.json of the weights."
    )
  if vision["patch_size"] > vision.get("image_size", math.inf):
    raise ValueError(
      f"patch_size={vision['patch_size']} exceeds image_size={vision['image_size']}. "
      "Give the config.json of the weights."
    )


# Rotary positions.

MAX_ROPE = 1e15  # Largest number in rope_parameters; published bases are up to 1e9.


def read_rope_scaling(text: HfConfig) -> RopeScaling | None:
  """Reads the scaling of rotary frequencies from a language model's config.

  Raises:
    ValueError: The kind of scaling is not supported, or a value is missing.
  """
  rope = text["rope_parameters"]
  kind = rope.get("rope_type", "default")
  if rope.get("partial_rotary_factor", 1) != 1:
    raise ValueError(
      f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']!r}. Give "
      "another checkpoint."
    )
  keys: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
      "factor",
      "low_freq_factor",
      "high_freq_factor",
      "original_max_position_embeddings",
    ),
  }
  if not isinstance(kind, str) or kind not in keys:
    raise ValueError(
      f"rope_type must be one of {list(keys)}, got {kind!r} (rope_scaling or "
      "rope_parameters in config.json). Give another checkpoint."
    )
  numbers = []
  for key in ("rope_theta", *keys[kind]):
    value = rope.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value <= MAX_ROPE):  # False for NaN as well.
      raise ValueError(
        f"rope_parameters.{key} must be a number above 0 and up to {MAX_ROPE:g} for "
        f"rope_type={kind!r}, got {value!r}. Give the config.json of the weights."
      )
    numbers.append(float(value))
  if kind == "default":
    return None
  if kind == "linear":
    return RopeScaling(kind, numbers[1])
  _, factor, low, high, context = numbers
  return RopeScaling(kind, factor, low, high, int(context))


def write_rope_scaling(scaling: RopeScaling | None) -> HfConfig:
  """Returns the rope_parameters of a scaling; the inverse of read_rope_scaling."""
  if scaling is None:
    return {"rope_type": "default"}
  if scaling.kind == "linear":
    return {"rope_type": "linear", "factor": scaling.factor}
  return {
    "rope_type": scaling.kind,
    "factor": scaling.factor,
    "low_freq_factor": scaling.low,
    "high_freq_factor": scaling.high,
    "original_max_position_embeddings": scaling.context,
  }


def read_window(text: HfConfig) -> int | None:
  """Returns the sliding window of a language model in tokens; None without one.

  Some layers of a Qwen may have full attention. The window then applies to the others.
  """
  layers = text.get("layer_types")
  if layers is not None and "sliding_attention" not in layers:
    return None
  return text.get("sliding_window") if text["model_type"] != "llama" else None
