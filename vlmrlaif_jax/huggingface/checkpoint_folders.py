"""Finds the folders of a checkpoint: its adapter, the adapter's base, its tokenizer."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmrlaif_jax.huggingface.adapter_config import ADAPTER_CONFIG
from vlmrlaif_jax.huggingface.config_keys import read_json_object

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
PROCESSOR_FILES = (
  "processor_config.json",
  "preprocessor_config.json",
  "video_preprocessor_config.json",
)


def find_folder(folder: Path, name: str) -> Path | None:
  """Finds a folder by its path, inside the checkpoint's folder, or next to it."""
  for path in (Path(name), folder / name, folder.parent / Path(name).name):
    if name and (path / "config.json").exists():
      return path
  return None


def find_adapter(folder: Path) -> Path | None:
  """Finds the folder of the only adapter in a folder or below it.

  VLM-RLAIF stores adapters in lora_default/ or adapter_model/lora_default/. An adapter
  in the folder itself precedes those below it, and those in checkpoint-N/ come last.

  Returns:
    The folder that contains the adapter's config, or None.

  Raises:
    ValueError: There are several adapters.
  """
  if (folder / ADAPTER_CONFIG).exists():
    return folder
  folders = sorted(path.parent for path in folder.rglob(ADAPTER_CONFIG))
  is_step = lambda path: any(
    re.fullmatch(r"checkpoint-\d+", part) for part in path.relative_to(folder).parts
  )
  folders = [path for path in folders if not is_step(path)] or folders
  if len(folders) > 1:
    raise ValueError(
      f"{folder} contains {len(folders)} adapters. Give the folder of one of them: "
      f"{[str(path) for path in folders]}"
    )
  return folders[0] if folders else None


def find_own_adapter(folder: Path) -> Path | None:
  """Finds the adapter of a folder; below it only if the folder has no weights."""
  weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
  if weights and not (folder / ADAPTER_CONFIG).exists():
    return None
  return find_adapter(folder)


def find_tokenizer_folder(folder: Path) -> Path:
  """Finds the folder of a checkpoint's tokenizer: its own, or an adapter's base.

  Raises:
    FileNotFoundError: The base of the adapter does not exist.
  """
  return _find_with(folder, TOKENIZER_FILES)


def find_processor_folder(folder: Path) -> Path:
  """Finds the folder of a checkpoint's processor; see find_tokenizer_folder."""
  return _find_with(folder, PROCESSOR_FILES)


def find_generation_folder(folder: Path) -> Path:
  """Finds the folder of a checkpoint's generation settings; see stop_tokens.

  Raises:
    FileNotFoundError: The base of an adapter does not exist.
  """
  return _find_with(folder, ("generation_config.json", "config.json"))


def _find_with(folder: Path, names: Sequence[str]) -> Path:
  """Finds the folder that has one of the files: the given one, or an adapter's base."""
  if any((folder / name).exists() for name in names):
    return folder
  adapter = find_own_adapter(folder)
  return folder if adapter is None else _find_with(find_base(folder, adapter), names)


def find_base(folder: Path, adapter: Path) -> Path:
  """Finds the folder of an adapter's base.

  Raises:
    FileNotFoundError: It does not exist.
    ValueError: It is the adapter itself, or is an adapter of it.
  """
  seen, first = [folder.resolve()], folder
  while True:
    name = read_json_object(adapter / ADAPTER_CONFIG)
    base = _find_named_base(folder, name.get("base_model_name_or_path"))
    first = base if len(seen) == 1 else first
    if base.resolve() in seen:
      raise ValueError(
        f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path leads to {base}, which "
        "is an adapter of itself. Set it to the folder of the base model."
      )
    inner = find_own_adapter(base)
    if inner is None:
      return first
    seen, folder, adapter = [*seen, base.resolve()], base, inner


def _find_named_base(folder: Path, name: Any) -> Path:
  base = find_folder(folder, name) if isinstance(name, str) else None
  if base is None:
    raise FileNotFoundError(
      f"{folder} contains an adapter of {name!r}, which is not a local folder. Put the "
      "base there, or set base_model_name_or_path in "
      f"{ADAPTER_CONFIG} to its path."
    )
  return base
