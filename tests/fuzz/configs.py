"""Damaged checkpoints: small ones whose config files are changed at random."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.rows import damage_bytes
from tests.helpers import checkpoints

VALUES: tuple[Any, ...] = (
  None, "", 0, -1, 1, 3, 0.5, 1e9, 10**30, True, False, [], [-2, -3], {}, "auto",
  "linear", "pad", {"type": "yarn", "factor": 4.0}, {"rope_type": "dynamic"}, "\ud800",
)  # fmt: skip
# Keys of published configs, which may be absent from the small ones.
KEYS = (
  "sliding_window", "use_sliding_window", "rope_scaling", "rope_theta", "head_dim",
  "rope_parameters", "quantization_config", "vision_feature_layer", "attention_bias",
  "vision_feature_select_strategy", "image_aspect_ratio", "tie_word_embeddings",
  "model_type", "auto_map", "hidden_act", "mlp_bias", "layer_types", "vocab_size",
  "mm_projector_type", "mm_vision_select_layer", "mm_use_im_start_end", "dtype",
  "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "lora_bias",
  "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern", "bias",
  "fan_in_fan_out", "target_modules", "peft_type", "base_model_name_or_path",
  "trainable_token_indices", "target_parameters", "exclude_modules", "eva_config",
)  # fmt: skip


def write_whole(folder: Path) -> list[Path]:
  """Writes a checkpoint of each layout, and an adapter of one of them."""
  folder.mkdir(parents=True)
  base = checkpoints.llava()
  base.save_pretrained(folder / "hf")
  checkpoints.write_tower(folder / "tower", base)
  tower = str(folder / "tower")
  checkpoints.write_original(folder / "original", base, mm_vision_tower=tower)
  checkpoints.llava("qwen2").save_pretrained(folder / "qwen2")
  factors = checkpoints.factors(4)
  checkpoints.write_adapter(folder / "adapter", factors, folder / "hf", rank=4)
  return [folder / name for name in ("hf", "original", "qwen2", "adapter")]


def _change(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
  value = copy.deepcopy(value)
  inner = [v for v in value.values() if isinstance(v, dict)]
  holder = rng.choice([value, *inner])
  for _ in range(rng.choice((1, 1, 3))):
    key = rng.choice([*KEYS, *holder])
    if rng.random() < 0.25:
      holder.pop(key, None)
    else:
      holder[key] = rng.choice(VALUES)
  return value


def write_damaged(
  folder: Path, rng: random.Random, count: int
) -> Iterator[tuple[str, Path]]:
  """Yields what was changed in a checkpoint, and the folder of the result."""
  whole = write_whole(folder / "whole")
  for number in range(count):
    source, target = rng.choice(whole), folder / str(number)
    shutil.copytree(source, target)
    file = target / rng.choice([p.name for p in target.glob("*config.json")])
    if rng.random() < 0.15:
      file.write_bytes(damage_bytes(file.read_bytes(), rng))
    else:
      file.write_text(json.dumps(_change(json.loads(file.read_text()), rng)))
    yield f"{source.name}/{file.name}", target
