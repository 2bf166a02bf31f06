"""Reads and writes LoRA adapters in PEFT's format.

`read_adapter` opens an adapter, including the layouts of LLaVA and VLM-RLAIF.
`fold_adapter` adds it to a base checkpoint.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax.core import files
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.huggingface import param_mapping, tensor_files
from vlmrlaif_jax.huggingface.tensor_files import Index, Tensor, Tensors
from vlmrlaif_jax.models import llama

ADAPTER_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_UNSUPPORTED = (
  "use_dora",
  "use_rslora",
  "rank_pattern",
  "alpha_pattern",
  "fan_in_fan_out",
)
# Module, A or B, and the name of the adapter, which some files include.
_FACTOR = re.compile(r"(.*)\.lora_([AB])\.(?:\w+\.)?weight")
# Path of each adapted module -> its name in a checkpoint.
_ADAPTED = {
  path.removesuffix("/kernel"): name.removesuffix(".weight")
  for path, (name, _) in llama.HF.items()
  if path.startswith("blocks/") and path.endswith("/kernel")
}
# Target modules, as PEFT names them.
ADAPTED_MODULES = sorted(name.split(".")[-1] for name in _ADAPTED.values())
# Path of each LoRA factor of a language model -> its name in a PEFT file.
_FACTORS = {
  f"{path}/{factor}": (f"base_model.model.{name}.lora_{factor.upper()}.weight", "T")
  for path, name in _ADAPTED.items()
  for factor in ("a", "b")
}


class Adapter(NamedTuple):
  """A LoRA adapter whose tensors are not read yet."""

  folder: Path
  # Module name, as in make_llava_table -> "A" or "B" -> factor.
  factors: dict[str, dict[str, Tensor]]
  rest: dict[str, Tensor]  # Tensors that are trained whole, such as the projector.
  rank: int
  alpha: float
  base: str  # Folder or Hub name of the base model; "" if unknown.


def find_adapter(folder: Path) -> Path | None:
  """Finds the folder of the only adapter in a folder or below it.

  VLM-RLAIF stores adapters in lora_default/ or adapter_model/lora_default/.

  Returns:
    The folder that contains the adapter's config, or None.

  Raises:
    ValueError: There are several adapters.
  """
  folders = sorted(path.parent for path in folder.rglob(ADAPTER_CONFIG))
  if len(folders) > 1:
    raise ValueError(
      f"{folder} contains {len(folders)} adapters. Give the folder of one of them: "
      f"{[str(path) for path in folders]}"
    )
  return folders[0] if folders else None


def read_adapter(folder: Path, rename: Callable[[str], str]) -> Adapter:
  """Opens the only adapter in a folder or below it.

  Args:
    folder: Folder of the adapter, or one above it.
    rename: Maps a published tensor name to its name in make_llava_table.

  Raises:
    FileNotFoundError: There is no adapter, or it has no weights file.
    ValueError: The config is not supported, or does not match the tensors.
  """
  inner = find_adapter(folder)
  if inner is None:
    raise FileNotFoundError(
      f"no {ADAPTER_CONFIG} in {folder} or below it. Give the folder of an adapter."
    )
  config = files.read_json(inner / ADAPTER_CONFIG)
  _check_config(inner, config)
  weights = next((inner / name for name in _FILES if (inner / name).is_file()), None)
  if weights is None:
    raise FileNotFoundError(
      f"{inner} has a {ADAPTER_CONFIG}, but none of {_FILES}. Download the weights too."
    )
  factors: dict[str, dict[str, Tensor]] = {}
  rest: dict[str, Tensor] = {}
  for path in (weights, *inner.glob("non_lora_trainables.bin")):
    for name, x in tensor_files.open_file(path).items():
      if match := _FACTOR.fullmatch(rename(name)):
        factors.setdefault(match[1], {})[match[2]] = x
      else:
        rest[rename(name)] = x
  adapter = Adapter(
    folder,
    factors,
    rest,
    config["r"],
    float(config["lora_alpha"]),
    config.get("base_model_name_or_path") or "",
  )
  _check_ranks(adapter)
  return adapter


def _check_config(folder: Path, config: Mapping) -> None:
  missing = [key for key in ("r", "lora_alpha") if key not in config]
  if missing:
    raise ValueError(
      f"{folder / ADAPTER_CONFIG} lacks the keys {missing}. Give an adapter of LoRA."
    )
  for key in _UNSUPPORTED:
    if config.get(key):
      raise ValueError(
        f"{folder / ADAPTER_CONFIG}: {key}={config[key]!r} is not supported. Give an "
        "adapter of plain LoRA."
      )
  if config.get("bias", "none") != "none":
    raise ValueError(
      f'{folder / ADAPTER_CONFIG}: bias must be "none", got {config["bias"]!r}'
    )


def _check_ranks(adapter: Adapter) -> None:
  """Checks that every module has both factors, of the rank in the config."""
  if not adapter.factors:
    raise ValueError(
      f"the adapter in {adapter.folder} contains no LoRA factors. Give another adapter."
    )
  for module, pair in adapter.factors.items():
    if set(pair) != {"A", "B"}:
      raise ValueError(
        f"the adapter in {adapter.folder} has only lora_{''.join(pair)} of {module}. "
        "Download its weights again."
      )
    a, b = pair["A"].shape, pair["B"].shape
    if a[0] != adapter.rank or b[1] != adapter.rank:
      raise ValueError(
        f"the adapter in {adapter.folder} has rank {a[0]} ({module}: A {a}, B {b}), "
        f"but its {ADAPTER_CONFIG} has r={adapter.rank}. Give files of one adapter."
      )


def check_adapter_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Checks that an adapter has the sizes of a model.

  Args:
    adapter: Adapter to check.
    shapes: Shapes of the model's tensors, by their names in make_llava_table.

  Raises:
    ValueError: A module is missing or has another size. The message has both sizes.
  """
  problems = []
  for module, pair in adapter.factors.items():
    adapter_shape = pair["B"].shape[0], pair["A"].shape[1]
    shape = shapes.get(f"{module}.weight")
    if shape is None:
      problems.append(f"{module}: the model has no such matrix")
    elif tuple(shape) != adapter_shape:
      problems.append(
        f"{module}: {adapter_shape} in the adapter, {tuple(shape)} in the model"
      )
  if problems:
    layers = {m.split("layers.")[-1].split(".")[0] for m in adapter.factors}
    raise ValueError(
      f"the adapter in {adapter.folder} belongs to another model: "
      f"{len(problems)} of its {len(adapter.factors)} matrices do not fit, and it has "
      f"{len(layers)} layers of width {_format_width(adapter)}:\n  "
      + "\n  ".join(problems[:4])
      + f"\nGive this model's adapter, or the adapter's base ({adapter.base!r})."
    )


def _format_width(adapter: Adapter) -> str:
  """Formats the width of an adapter, with the size of the LLaMA that has it."""
  width = min(pair["A"].shape[1] for pair in adapter.factors.values())
  names = [n for n, shape in llama.VARIANTS.items() if shape["embed"] == width]
  return f"{width} (LLaMA {names[0]})" if names else str(width)


def fold_adapter(tensors: Tensors, adapter: Adapter) -> Tensors:
  """Returns the base tensors plus the adapter's updates, W + alpha / r B A.

  The result is lazy: a slice of a matrix computes only that slice of the update.

  Args:
    tensors: Tensors of the base, by their names in make_llava_table.
    adapter: Adapter of this base. Its whole tensors replace those of the base.

  Raises:
    ValueError: The adapter does not fit the base.
  """
  check_adapter_fits(adapter, {name: x.shape for name, x in tensors.items()})
  scale = adapter.alpha / adapter.rank

  def fold(base: Tensor | np.ndarray, a: Tensor, b: Tensor) -> Tensor:
    def read(index: Index) -> np.ndarray:
      rows, columns = index
      left, right = (x.astype(np.float32) for x in (b[rows, :], a[:, columns]))
      update = scale * (left @ right)
      return (base[index].astype(np.float32) + update).astype(base.dtype)

    return Tensor(base.shape, jnp.dtype(base.dtype), read)

  updated = {
    f"{module}.weight": fold(tensors[f"{module}.weight"], pair["A"], pair["B"])
    for module, pair in adapter.factors.items()
  }
  return {**tensors, **updated, **adapter.rest}


def convert_to_peft(lora: Params) -> dict[str, np.ndarray]:
  """Converts LoRA factors to the tensors of a PEFT file.

  Args:
    lora: Collection "lora" of a language model, stacked over layers.

  Returns:
    Tensor name -> factor of one layer.
  """
  return dict(param_mapping.convert_to_hf(_FACTORS, lora))
