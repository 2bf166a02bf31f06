"""Detects the layout of a checkpoint folder and opens it in one common form.

`find_layout` is the main function. The common form of a LLaVA has the config and the
tensor names of transformers before version 5, which `make_llava_table` maps. For other
families, see families.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig

from vlmrlaif_jax.huggingface import (
  config_keys,
  families,
  peft_adapters,
  published_names,
  vision_towers,
)
from vlmrlaif_jax.huggingface.checkpoint_folders import (
  find_adapter,
  find_base,
  find_folder,
  find_own_adapter,
)
from vlmrlaif_jax.huggingface.checkpoint_folders import (
  find_tokenizer_folder as find_tokenizer_folder,
)
from vlmrlaif_jax.huggingface.config_keys import HfConfig as HfConfig
from vlmrlaif_jax.huggingface.config_keys import read_json_object
from vlmrlaif_jax.huggingface.image_preprocessing import (
  PixelScale,
  read_preprocessing,
)
from vlmrlaif_jax.huggingface.tensor_files import Tensors
from vlmrlaif_jax.models import clip, projector, siglip
from vlmrlaif_jax.models.decoders import llama, mistral, qwen2, qwen3
from vlmrlaif_jax.models.layers import write_fields

# Model type -> family.
DECODER_FAMILIES = {
  "llama": llama,
  "mistral": mistral,
  "qwen2": qwen2,
  "qwen3": qwen3,
}
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


_TEXT_NAMES = {
  "llama": "LLaMA",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
}
# Model type of the original LLaVA -> that of its language model.
_ORIGINAL_TYPES = {
  "llava": "llama",
  "llava_llama": "llama",
  "llava_llama_3": "llama",
  "llava_mistral": "mistral",
  "llava_qwen": "qwen2",
}
# Keys of CheckpointLayout.config that transformers does not have.
OWN_KEYS = ("projector_depth", "image_mean", "image_std")
_DEPTHS = {"linear": 1, "mlp2x_gelu": 2}  # mm_projector_type of the original LLaVA.


class CheckpointLayout(NamedTuple):
  """An opened checkpoint in the common form; its tensors are not read yet."""

  name: str  # Name of the layout.
  # Config of the family. That of a LLaVA also has "projector_depth", and "image_mean"
  # and "image_std" if the files have them.
  config: HfConfig
  tensors: Tensors  # Name, as in convert.make_table -> tensor.
  # Unused keys; unused, initialized and merged tensors; for the log.
  notes: tuple[str, ...] = ()


def find_layout(folder: Path, *, tower: str = "") -> CheckpointLayout:
  """Detects the layout of a checkpoint from its files and opens it.

  Args:
    folder: Folder of the checkpoint.
    tower: Folder of a CLIP or SigLIP, for a checkpoint without a tower.

  Raises:
    FileNotFoundError: A folder that the config names does not exist.
    ValueError: The layout is not supported.
  """
  if find_own_adapter(folder) is not None:
    return _open_adapted(folder, tower)
  config = read_json_object(folder / "config.json")
  model_type = config.get("model_type")
  if model_type in families.FAMILIES:
    full, key_notes = families.read_family_config(folder)
    own = families.open_family_tensors(folder, model_type)
    full = families.match_config(folder, full, own)
    name = f"Hugging Face {families.FAMILIES[model_type].name}"
    return CheckpointLayout(name, full, own, tuple(key_notes))
  if "mm_vision_tower" in config:
    tensors, notes = published_names.open_tensors(folder)
    if families.is_original_onevision(config):
      full, notes = families.convert_original(folder, config, tensors, tower)
      return CheckpointLayout("original LLaVA-OneVision", full, tensors, notes)
    return _open_original(folder, config, tensors, notes, tower)
  if model_type == "llava":
    full, key_notes = _read_llava(folder)
    tensors, notes = published_names.open_tensors(folder)
    full = _match_config(full, tensors)
    return CheckpointLayout("Hugging Face LLaVA", full, tensors, (*key_notes, *notes))
  if model_type in DECODER_FAMILIES:
    return _open_plain(folder, config, tower)
  raise ValueError(_describe_unsupported(folder, model_type))


def read_checkpoint_config(folder: Path) -> HfConfig:
  """Reads the config of a LLaVA or of another family, without its weights.

  Raises:
    ValueError: The config is that of another model, or has an unsupported key.
  """
  config = read_json_object(folder / "config.json")
  is_family = config.get("model_type") in families.FAMILIES
  return (families.read_family_config if is_family else _read_llava)(folder)[0]


def _read_llava(folder: Path) -> tuple[HfConfig, list[str]]:
  """Reads the config of a Hugging Face LLaVA; also returns notes about unused keys."""
  path = folder / "config.json"
  raw = read_json_object(path)
  if raw.get("model_type") != "llava":
    raise ValueError(_describe_unsupported(folder, raw.get("model_type")))
  for part, known in (
    ("text_config", DECODER_FAMILIES),
    ("vision_config", TOWER_FAMILIES),
  ):
    inner = raw.get(part)
    model_type = inner.get("model_type") if isinstance(inner, dict) else None
    if model_type is not None and str(model_type) not in known:
      raise ValueError(
        f"{path}: {part}.model_type must be one of {sorted(known)}, got {model_type!r}"
      )
  full = config_keys.make_config(LlavaConfig, raw, path)
  notes = config_keys.check_nested_keys(path, raw, full)
  config_keys.check_sizes(full["text_config"], full["vision_config"])
  size = full["vision_config"]["image_size"]
  scale, image_notes = read_preprocessing(folder, size)
  full = {**full, "projector_depth": 2, **_scale_keys(scale)}
  return full, [*notes, *image_notes]


def _scale_keys(scale: PixelScale | None) -> HfConfig:
  return {} if scale is None else {"image_mean": scale.mean, "image_std": scale.std}


def _describe_unsupported(folder: Path, model_type: str | None) -> str:
  known = ["llava", "llava_llama", *families.FAMILIES, *DECODER_FAMILIES]
  return (
    f"{folder / 'config.json'}: model_type must be one of {known}, with weights next "
    f"to it; got {model_type!r}. Give another checkpoint."
  )


def _open_adapted(folder: Path, tower: str) -> CheckpointLayout:
  """Opens an adapter, its base, and the tensors that were trained whole."""
  base = find_base(folder, find_adapter(folder) or folder)
  adapter = peft_adapters.read_adapter(folder, _choose_renaming(base))
  own = folder / "config.json"
  config = read_json_object(own) if own.exists() else {}
  if "mm_vision_tower" in config:
    own_tensors, notes = published_names.open_tensors(base)
    layout = _open_original(folder, config, own_tensors | adapter.rest, notes, tower)
  else:
    layout = find_layout(base, tower=tower)
  tensors = peft_adapters.fold_adapter(layout.tensors, adapter)
  rest = published_names.format_counts(name.split(".")[0] for name in adapter.rest)
  return layout._replace(
    name=f"LoRA adapter on {layout.name}",
    config=_match_adapted(base, layout.config, tensors),
    tensors=tensors,
    notes=(
      *layout.notes,
      *adapter.config.notes,
      adapter.describe(),
      *((f"replaced: {rest}",) if adapter.rest else ()),
    ),
  )


def _choose_renaming(base: Path) -> Callable[[str], str]:
  """Returns the function that maps names of an adapter's base to the common form."""
  file = base / "config.json"
  config = read_json_object(file) if file.exists() else {}
  kind = str(config.get("model_type"))
  if kind not in families.FAMILIES:
    return published_names.rename_published
  prefix = "base_model.model."
  return lambda name: families.rename_tensor(kind, name.removeprefix(prefix))


def _match_adapted(base: Path, config: HfConfig, tensors: Tensors) -> HfConfig:
  """Makes a config consistent with the tensors of a base and its adapter."""
  if config["model_type"] in families.FAMILIES:
    return families.match_config(base, config, tensors)
  return _match_config(config, tensors)


def _open_original(
  folder: Path, config: HfConfig, tensors: Tensors, notes: tuple[str, ...], tower: str
) -> CheckpointLayout:
  """Opens the layout of the LLaVA repository: a decoder whose config names a tower."""
  depth = _check_original(folder, config)
  is_inside = any(name.startswith("vision_tower.") for name in tensors)
  tower = tower or config["mm_vision_tower"]
  path = find_folder(folder, tower) if isinstance(tower, str) else None
  scale = None
  if path is not None:
    vision, scale, image_notes = vision_towers.read_tower_config(path)
    notes = (*notes, *image_notes)
    if not is_inside:
      tower_tensors, tower_notes = vision_towers.open_tower(path)
      tensors, notes = {**tensors, **tower_tensors}, (*notes, *tower_notes)
  elif is_inside and Path(tower).name in vision_towers.VARIANTS:
    variant = clip.VARIANTS[vision_towers.VARIANTS[Path(tower).name]]
    module = clip.VisionTower(**variant)
    vision = CLIPVisionConfig(**write_fields(clip.CONFIG, module)).to_dict()
  else:
    raise FileNotFoundError(
      f"{folder} has the vision tower {tower!r}, which is not a local folder. Put the "
      "CLIP folder there, or set --config.model.tower to its path."
    )
  if config.get("unfreeze_mm_vision_tower") and not is_inside:
    raise ValueError(
      f"{folder}: unfreeze_mm_vision_tower=True, so its vision tower was trained, but "
      "the files lack it. Give a checkpoint that contains its tower."
    )
  if config.get("mm_hidden_size", vision["hidden_size"]) != vision["hidden_size"]:
    raise ValueError(
      f"{folder}: mm_hidden_size is {config['mm_hidden_size']}, but the vision tower "
      f"{tower} has {vision['hidden_size']} channels. Give the tower of the config."
    )
  layer = config.get("mm_vision_select_layer", -2)
  text = {**config, "model_type": _ORIGINAL_TYPES[config.get("model_type", "llava")]}
  full = join_configs(text, vision, layer, depth, folder / "config.json")
  key_notes = config_keys.check_original_keys(
    folder / "config.json", config, text["model_type"]
  )
  full = {**_match_config(full, tensors), **_scale_keys(scale)}
  where = "inside" if is_inside else f"from {path}"
  return CheckpointLayout(
    "original LLaVA", full, tensors, (f"vision tower {where}", *key_notes, *notes)
  )


def _check_original(folder: Path, config: HfConfig) -> int:
  """Checks the keys of an original LLaVA; returns the depth of its projector."""
  path = folder / "config.json"
  required: dict[str, tuple] = {
    "model_type": tuple(_ORIGINAL_TYPES),
    "mm_projector_type": tuple(_DEPTHS),
    "mm_vision_select_feature": ("patch",),
    "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
  }
  kind = config.get("mm_projector_type", "linear")
  for key, allowed in required.items():
    value = kind if key == "mm_projector_type" else config.get(key, allowed[0])
    if value not in allowed:
      need = f"one of {sorted(allowed)}" if len(allowed) > 1 else repr(allowed[0])
      raise ValueError(
        f"{path}: {key} must be {need}, got {value!r}. Give another checkpoint."
      )
  return _DEPTHS[kind]


def _open_plain(folder: Path, config: HfConfig, tower: str) -> CheckpointLayout:
  """Opens a language model and a tower, and adds a random projector."""
  path = find_folder(folder, tower) if tower else None
  if path is None:
    raise FileNotFoundError(
      f"{folder} is a language model without a vision tower, and model.tower={tower!r} "
      "is not a folder. Set --config.model.tower to the folder of a CLIP or SigLIP."
    )
  own = folder / "config.json"
  vision, scale, vision_notes = vision_towers.read_tower_config(path)
  full = join_configs(config, vision, -2, 2, own)
  unused = config_keys.check_keys(own, config, CONFIG_MAPPING[config["model_type"]])
  tensors, notes = published_names.open_tensors(folder)
  tower_tensors, tower_notes = vision_towers.open_tower(path)
  full = {**_match_config(full, tensors), **_scale_keys(scale)}
  notes = (
    f"vision tower from {path}",
    "random projector",
    *config_keys.describe_unused(own, unused),
    *vision_notes,
    *notes,
    *tower_notes,
  )
  name = f"plain {_TEXT_NAMES[config['model_type']]}"
  projector_tensors = vision_towers.make_random_projector(full)
  together: Tensors = {**tensors, **tower_tensors, **projector_tensors}
  return CheckpointLayout(name, full, together, notes)


def join_configs(
  text: HfConfig,
  vision: HfConfig,
  layer: Any,
  depth: int,
  path: Path = Path("config.json"),
) -> HfConfig:
  """Builds the config of a LLaVA from those of a language model and a tower.

  Args:
    text: Config of the language model.
    vision: Config of the tower.
    layer: Layer of the tower whose tokens are read, or a list of them; -2 is the last
      but one.
    depth: Number of linear layers of the projector.
    path: File of the language model's config, for messages.

  Raises:
    ValueError: A value has the wrong type or an impossible size.
  """
  text = config_keys.make_config(CONFIG_MAPPING[text["model_type"]], text, path)
  config_keys.check_sizes(text, vision)
  side = vision["image_size"] // vision["patch_size"]
  is_clip = vision["model_type"] == "clip_vision_model"
  values = {
    "text_config": text,
    "vision_config": vision,
    # The first id after the vocabulary; see export.add_image_token.
    "image_token_index": text["vocab_size"],
    "image_seq_length": side**2,
    "vision_feature_layer": layer,
    # "default" drops the class token, which SigLIP does not have.
    "vision_feature_select_strategy": "default" if is_clip else "full",
    "projector_hidden_act": "gelu",
  }
  full = config_keys.make_config(LlavaConfig, values, path)
  return {**full, "projector_depth": depth}


def _check_projector(config: HfConfig, tensors: Tensors) -> None:
  """Checks that the projector reads as many channels as the selected layers have."""
  layers = config["vision_feature_layer"]
  count = len(layers) if isinstance(layers, list) else 1
  channels = count * config["vision_config"]["hidden_size"]
  weight = tensors.get("multi_modal_projector.linear_1.weight")
  if weight is not None and weight.shape[-1] != channels:
    raise ValueError(
      f"vision_feature_layer={layers} gives {channels} channels for each patch, but "
      f"the projector reads {weight.shape[-1]}. Give the config.json of the weights, "
      "or their vision tower."
    )


def _match_config(config: HfConfig, tensors: Tensors) -> HfConfig:
  """Makes a config consistent with the tensors of the files.

  The pooling head is turned off. The embeddings are tied only if the files lack an
  output matrix: transformers also ignores `tie_word_embeddings` if they have one.
  """
  text, vision = config["text_config"], config["vision_config"]
  _check_projector(config, tensors)
  is_tied = config["tie_word_embeddings"] or text["tie_word_embeddings"]
  tied = {
    "tie_word_embeddings": is_tied and "language_model.lm_head.weight" not in tensors
  }
  if vision["model_type"] == "siglip_vision_model":
    vision = {**vision, "vision_use_head": False}
  return {**config, **tied, "text_config": {**text, **tied}, "vision_config": vision}
