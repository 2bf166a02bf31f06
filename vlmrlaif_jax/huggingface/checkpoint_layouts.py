"""Which layout a checkpoint folder has, and what is the same in all of them.

Whoever published it, a checkpoint comes out as the config and the tensor names of
transformers' LLaVA before version 5, which llava_table speaks of.
"""

import collections
import functools
import re
from collections.abc import Callable, Iterable, Mapping
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
from vlmrlaif_jax.huggingface import peft_adapters, tensor_files
from vlmrlaif_jax.huggingface.tensor_files import Tensor, Tensors
from vlmrlaif_jax.models import clip, llama, projector, qwen2, qwen3, siglip

HfConfig: TypeAlias = dict[str, Any]  # What a config.json says.

DECODER_FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}  # By model_type.
TOWER_FAMILIES = {"clip_vision_model": clip, "siglip_vision_model": siglip}

_under = lambda ours, theirs, table: {
  f"{ours}/{path}": (theirs + name, op) for path, (name, op) in table.items()
}

# Each a param_mapping.Table.
PROJECTOR_TABLE = _under("projector", "multi_modal_projector.", projector.HF)


def make_llava_table(text: str, vision: str) -> dict[str, tuple[str, str]]:
  """That of LLaVAs, by the model_types of language model and tower."""
  return {
    **_under("vision", "vision_tower.vision_model.", TOWER_FAMILIES[vision].HF_VISION),
    **PROJECTOR_TABLE,
    **_under("llm", "language_model.", DECODER_FAMILIES[text].HF),
  }


# What is left over -> its names, of which notes tell the group.
_UNUSED = {
  # Older versions of transformers wrote them beside the parameters.
  "buffers, computed anew": r"(position_ids|rotary_emb\.inv_freq)$",
  # SigLIP's; no LLaVA pools.
  "the head that pools images": r"^(?:vision_tower\.)?((?:vision_model\.)?head)\.",
}
# Of a CLIP or SigLIP folder.
_NOT_TOWER = {
  "not of the tower": (
    r"^(text_model|(?:visual|text)_projection|logit_(?:scale|bias))(?:\.|$)"
  ),
}
_TEXT_NAMES = {"llama": "LLaMA", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# By the model_type of the tower's folder, which may hold a text tower too.
_TOWER_CONFIGS: dict[str, type[PreTrainedConfig]] = {
  "clip": CLIPVisionConfig,
  "clip_vision_model": CLIPVisionConfig,
  "siglip": SiglipVisionConfig,
  "siglip_vision_model": SiglipVisionConfig,
}
# Published names -> those of llava_table; all that match are applied, in order.
_NAMES = (
  (r"^base_model\.model\.", ""),  # PEFT.
  # The original LLaVA.
  (r"^model\.vision_tower\.(?=vision_tower\.)", ""),
  (r"^model\.mm_projector\.(?=weight|bias)", "multi_modal_projector.linear_1."),
  (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
  (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
  (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
  (r"^lm_head\.", "language_model.lm_head."),
  # transformers in memory from 4.52, on disk from 5.
  (r"^model\.(?=language_model|vision_tower|multi_modal)", ""),
  (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
  (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
# Towers that configs name by their place on the hub -> our variants.
_TOWERS = {
  "clip-vit-large-patch14-336": "l14_336",
  "clip-vit-large-patch14": "l14",
  "clip-vit-base-patch32": "b32",
}
_DEPTHS = {"linear": 1, "mlp2x_gelu": 2}  # Of the original LLaVA's mm_projector_type.


def read_fields(fields: Mapping[str, str], config: HfConfig) -> dict[str, Any]:
  """A module's fields from a config, by its family's CONFIG."""
  look = lambda path: functools.reduce(lambda at, key: at[key], path.split("."), config)
  return {ours: look(theirs) for ours, theirs in fields.items()}


def write_fields(fields: Mapping[str, str], module: nn.Module) -> HfConfig:
  """The config that take has taken a module's fields from."""
  given = {theirs: module.__dict__[ours] for ours, theirs in fields.items()}
  return unflatten_dict(given, sep=".")


class CheckpointLayout(NamedTuple):
  """A checkpoint of any layout; its tensors are not read yet."""

  name: str
  config: HfConfig  # As LlavaConfig has it, and "projector_depth".
  tensors: Tensors  # By the names of llava_table.
  notes: tuple[str, ...] = ()  # What was left over, made up, folded in.


def find_layout(folder: Path, *, tower: str = "") -> CheckpointLayout:
  """Decides the layout from the files, and opens them.

  Args:
    tower: folder of a CLIP or SigLIP, for a checkpoint without a tower of its own.

  Raises:
    FileNotFoundError: what the config names is not there.
    ValueError: a layout that is not known.
  """
  if _adapter_in(folder) is not None:
    return _with_adapter(folder, tower)
  config = files.read_json(folder / "config.json")
  kind = config.get("model_type")
  if "mm_vision_tower" in config:
    tensors, dropped = open_tensors(folder)
    return _original(folder, config, tensors, dropped, tower)
  if kind == "llava":
    tensors, dropped = open_tensors(folder)
    full = LlavaConfig.from_pretrained(folder).to_dict()
    full["projector_depth"] = 2
    return CheckpointLayout(
      "Hugging Face LLaVA", _as_held(full, tensors), tensors, dropped
    )
  if kind in DECODER_FAMILIES:
    return _plain(folder, config, tower)
  raise ValueError(
    f'{folder / "config.json"}: model_type must be "llava", "llava_llama" or one of '
    f"{sorted(DECODER_FAMILIES)}, not {kind!r}"
  )


def rename_published(name: str) -> str:
  """The name in llava_table of a name in LLaVA's published checkpoints."""
  for pattern, ours in _NAMES:
    name = re.sub(pattern, ours, name)
  return name


def open_tensors(
  folder: Path, rename: Callable[[str], str] = rename_published
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
  """A folder's tensors under other names, without what no model of ours has, and
  notes of that.
  """
  held = {rename(name): x for name, x in tensor_files.open_folder(folder).items()}
  return _without(_UNUSED, folder, held)


def _without(
  unused: Mapping[str, str], folder: Path, held: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
  """A folder's tensors but those that are left over, and notes of these."""
  notes = []
  for what, pattern in unused.items():
    found = {name: m[1] for name in held if (m := re.search(pattern, name))}
    held = {name: x for name, x in held.items() if name not in found}
    if found:
      notes.append(f"left over in {folder.name}: {what} ({_counted(found.values())})")
  return held, tuple(notes)


def _counted(names: Iterable[str]) -> str:
  """How often each name is there: "2 a, 1 b"."""
  counts = collections.Counter(names)
  return ", ".join(f"{count} {name}" for name, count in counts.items())


def _adapter_in(folder: Path) -> Path | None:
  """The folder of an adapter, in this one or, if it holds no weights, below it."""
  whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
  if whole and not (folder / peft_adapters.ADAPTER_CONFIG).exists():
    return None
  return peft_adapters.find_adapter(folder)


def find_tokenizer_folder(folder: Path) -> Path:
  """Where a checkpoint's tokenizer is: with it, or with the base of an adapter.

  Raises:
    FileNotFoundError: the base is not there.
  """
  names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
  if any((folder / name).exists() for name in names):
    return folder
  adapter = _adapter_in(folder)
  if adapter is None:
    return folder
  config = files.read_json(adapter / peft_adapters.ADAPTER_CONFIG)
  return find_tokenizer_folder(
    _base(folder, config.get("base_model_name_or_path") or "")
  )


def _base(folder: Path, name: str) -> Path:
  """The folder of an adapter's base."""
  base = _beside(folder, name)
  if base is None:
    raise FileNotFoundError(
      f"{folder} holds an adapter of {name!r}, which is no folder here: put "
      "the base there, or its path as base_model_name_or_path in "
      f"{peft_adapters.ADAPTER_CONFIG}"
    )
  return base


def _with_adapter(folder: Path, tower: str) -> CheckpointLayout:
  """LLaVA's three pieces: an adapter, what was trained beside it, and its config."""
  adapter = peft_adapters.read_adapter(folder, rename_published)
  base = _base(folder, adapter.base)
  own = folder / "config.json"
  config = files.read_json(own, default={})
  if "mm_vision_tower" in config:
    tensors, dropped = open_tensors(base)
    under = _original(folder, config, tensors | adapter.rest, dropped, tower)
  else:
    under = find_layout(base, tower=tower)
  beside = _counted(name.split(".")[0] for name in adapter.rest)
  return under._replace(
    name=f"LoRA adapter on {under.name}",
    tensors=peft_adapters.fold_adapter(under.tensors, adapter),
    notes=(
      *under.notes,
      f"folded in: rank {adapter.rank} updates of {len(adapter.factors)} matrices",
      *((f"taken from beside it: {beside}",) if adapter.rest else ()),
    ),
  )


def _original(
  folder: Path, config: HfConfig, tensors: Tensors, notes: tuple[str, ...], tower: str
) -> CheckpointLayout:
  """The layout of the LLaVA repository: a LLaMA that names its vision tower."""
  depth = config.get("mm_projector_type", "linear")
  if depth not in _DEPTHS:
    raise ValueError(
      f"mm_projector_type must be one of {sorted(_DEPTHS)}, not {depth!r}"
    )
  for key, value in {
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
  }.items():
    if config.get(key, value) != value:
      raise ValueError(f"{key} must be {value!r}, not {config[key]!r}")
  inside = any(name.startswith("vision_tower.") for name in tensors)
  seen = tower or config["mm_vision_tower"]
  place = _beside(folder, seen)
  if place is not None:
    vision = _tower_config(place)
    if not inside:
      held, more = _tower(place)
      tensors, notes = {**tensors, **held}, (*notes, *more)
  elif inside and Path(seen).name in _TOWERS:
    known = clip.VisionTower(**clip.VARIANTS[_TOWERS[Path(seen).name]])
    vision = CLIPVisionConfig(**write_fields(clip.CONFIG, known)).to_dict()
  else:
    raise FileNotFoundError(
      f"{folder} has the vision tower {seen!r}, which is no folder here: put CLIP's "
      "folder there, or give its path as config.model.tower"
    )
  if config.get("mm_hidden_size", vision["hidden_size"]) != vision["hidden_size"]:
    raise ValueError(
      f"mm_hidden_size is {config['mm_hidden_size']}, but the vision tower {seen} has "
      f"{vision['hidden_size']} channels: it is another tower than the config's"
    )
  layer = config.get("mm_vision_select_layer", -2)
  text = {**config, "model_type": "llama"}
  full = _as_held(join_configs(text, vision, layer, _DEPTHS[depth]), tensors)
  where = "inside" if inside else f"from {place}"
  return CheckpointLayout(
    "original LLaVA", full, tensors, (f"vision tower {where}", *notes)
  )


def _plain(folder: Path, config: HfConfig, tower: str) -> CheckpointLayout:
  """A language model alone, a tower beside it, and a projector of random weights."""
  place = _beside(folder, tower) if tower else None
  if place is None:
    raise FileNotFoundError(
      f"{folder} is a language model without a vision tower: give a folder of "
      f"CLIP's or SigLIP's as config.model.tower, not {tower!r}"
    )
  tensors, notes = open_tensors(folder)
  held, more = _tower(place)
  full = _as_held(join_configs(config, _tower_config(place), -2, 2), tensors)
  made = f"vision tower from {place}", "fresh: projector"
  name = f"plain {_TEXT_NAMES[config['model_type']]}"
  return CheckpointLayout(
    name, full, {**tensors, **held, **_fresh_projector(full)}, (*made, *notes, *more)
  )


def _fresh_projector(config: HfConfig) -> dict[str, np.ndarray]:
  """Weights that keep the size of what goes through them, and no biases."""
  channels = config["vision_config"]["hidden_size"]
  embed = config["text_config"]["hidden_size"]
  rng, made = np.random.default_rng(0), {}
  for layer, inputs in (("linear_1", channels), ("linear_2", embed)):
    name = f"multi_modal_projector.{layer}"
    weight = rng.normal(scale=inputs**-0.5, size=(embed, inputs))
    made[f"{name}.weight"] = weight.astype(np.float32)
    made[f"{name}.bias"] = np.zeros(embed, np.float32)
  return made


def join_configs(text: HfConfig, vision: HfConfig, layer: int, depth: int) -> HfConfig:
  """The config of transformers' LLaVA of a language model's and a tower's."""
  side = vision["image_size"] // vision["patch_size"]
  is_clip = vision["model_type"] == "clip_vision_model"
  full = LlavaConfig(
    text_config=CONFIG_MAPPING[text["model_type"]].from_dict(text),
    vision_config=vision,
    # The first id that the language model does not have; see convert.widened.
    image_token_index=text["vocab_size"],
    image_seq_length=side**2,
    vision_feature_layer=layer,
    # SigLIP has no class token to leave out.
    vision_feature_select_strategy="default" if is_clip else "full",
    projector_hidden_act="gelu",
  )
  return {**full.to_dict(), "projector_depth": depth}


def _as_held(config: HfConfig, tensors: Tensors) -> HfConfig:
  """The config, made to say what of it the files hold: no head that pools images, and
  no output matrix if that is the embedding. One that they hold is used, as
  transformers does, whatever the config says.

  Raises:
    ValueError: a language model or a tower that we do not have.
  """
  for part, known in (
    ("text_config", DECODER_FAMILIES),
    ("vision_config", TOWER_FAMILIES),
  ):
    if (kind := config[part]["model_type"]) not in known:
      raise ValueError(
        f"{part}.model_type must be one of {sorted(known)}, not {kind!r}"
      )
  text, vision = config["text_config"], config["vision_config"]
  says_tied = config["tie_word_embeddings"] or text["tie_word_embeddings"]
  tied = {
    "tie_word_embeddings": says_tied and "language_model.lm_head.weight" not in tensors
  }
  if vision["model_type"] == "siglip_vision_model":
    vision = {**vision, "vision_use_head": False}
  return {**config, **tied, "text_config": {**text, **tied}, "vision_config": vision}


# Vision towers.


def _beside(folder: Path, name: str) -> Path | None:
  """The folder that a config names: as it says, or beside or in the checkpoint's."""
  for place in (Path(name), folder / name, folder.parent / Path(name).name):
    if name and (place / "config.json").exists():
      return place
  return None


def _tower_config(folder: Path) -> HfConfig:
  kind = files.read_json(folder / "config.json").get("model_type")
  if kind not in _TOWER_CONFIGS:
    raise ValueError(
      f"the vision tower {folder} must be one of {sorted(_TOWER_CONFIGS)}, not {kind!r}"
    )
  return _TOWER_CONFIGS[kind].from_pretrained(folder).to_dict()


def _tower(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
  """The tensors of a folder's vision tower, and notes of what is left over."""
  rename = lambda name: re.sub(r"^(vision_model\.)?", "vision_model.", name)
  held, notes = open_tensors(folder, rename=lambda name: name)
  held, more = _without(_NOT_TOWER, folder, held)
  return {f"vision_tower.{rename(n)}": x for n, x in held.items()}, (*notes, *more)
