"""LoRA as PEFT writes it, and as LLaVA and VLM-RLAIF publish it."""

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
_UNKNOWN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
# A factor's name: the module's, A or B, and that of the adapter in some files.
_FACTOR = re.compile(r"(.*)\.lora_([AB])\.(?:\w+\.)?weight")
# Paths of the modules that have an update -> their names in a checkpoint.
_UPDATED = {
  path.removesuffix("/kernel"): name.removesuffix(".weight")
  for path, (name, _) in llama.HF.items()
  if path.startswith("blocks/") and path.endswith("/kernel")
}
# The names that PEFT gives as target modules.
ADAPTED_MODULES = sorted(name.split(".")[-1] for name in _UPDATED.values())
# Path of each LoRA factor of a language model -> its name in PEFT's files.
_FACTORS = {
  f"{path}/{ours}": (f"base_model.model.{name}.lora_{theirs}.weight", "T")
  for path, name in _UPDATED.items()
  for ours, theirs in (("a", "A"), ("b", "B"))
}


class Adapter(NamedTuple):
  """A LoRA adapter's tensors, none of them read yet."""

  folder: Path
  factors: dict[str, dict[str, Tensor]]  # Module, by its name in llava_table.
  rest: dict[str, Tensor]  # What was trained beside them: the projector.
  rank: int
  alpha: float
  base: str  # The folder or hub name of the model it belongs to.


def find_adapter(folder: Path) -> Path | None:
  """The folder of the one adapter in a folder or below it; None: there is none.

  VLM-RLAIF's stand in lora_default/ or adapter_model/lora_default/.

  Raises:
    ValueError: there are several.
  """
  found = sorted(path.parent for path in folder.rglob(ADAPTER_CONFIG))
  if len(found) > 1:
    raise ValueError(
      f"{folder} holds {len(found)} adapters; give the folder of one of them: "
      f"{[str(path) for path in found]}"
    )
  return found[0] if found else None


def read_adapter(folder: Path, rename: Callable[[str], str]) -> Adapter:
  """The one adapter in a folder, or below it.

  Args:
    rename: from the names that any version wrote to those of llava_table.

  Raises:
    ValueError: its tensors are not what its config says, or not understood.
  """
  inner = find_adapter(folder)
  if inner is None:
    raise FileNotFoundError(
      f"no adapter in {folder}: no {ADAPTER_CONFIG} in it or below it"
    )
  config = files.read_json(inner / ADAPTER_CONFIG)
  _check(inner, config)
  weights = next((inner / name for name in _FILES if (inner / name).is_file()), None)
  if weights is None:
    raise FileNotFoundError(f"{inner} has a {ADAPTER_CONFIG}, but none of {_FILES}")
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


def _check(folder: Path, config: Mapping) -> None:
  missing = [key for key in ("r", "lora_alpha") if key not in config]
  if missing:
    raise ValueError(f"{folder / ADAPTER_CONFIG} does not say {missing}")
  for key in _UNKNOWN:
    if config.get(key):
      raise ValueError(
        f"{folder / ADAPTER_CONFIG}: {key} is not supported, only plain LoRA"
      )
  if config.get("bias", "none") != "none":
    raise ValueError(
      f'{folder / ADAPTER_CONFIG}: bias must be "none", not {config["bias"]!r}'
    )


def _check_ranks(adapter: Adapter) -> None:
  """Refuses factors without their partner, or of another rank than the config's."""
  if not adapter.factors:
    raise ValueError(f"the adapter in {adapter.folder} holds no LoRA factors")
  for module, pair in adapter.factors.items():
    if set(pair) != {"A", "B"}:
      raise ValueError(
        f"the adapter in {adapter.folder} has only lora_{''.join(pair)} of {module}"
      )
    a, b = pair["A"].shape, pair["B"].shape
    if a[0] != adapter.rank or b[1] != adapter.rank:
      raise ValueError(
        f"the adapter in {adapter.folder} is of rank {a[0]} ({module}: A {a}, B {b}), "
        f"but its {ADAPTER_CONFIG} says r={adapter.rank}: the two files are of two adapters"
      )


def check_adapter_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Refuses an adapter of a model of another size.

  Args:
    shapes: of the model's tensors, by their names in llava_table.

  Raises:
    ValueError: with both sizes.
  """
  told = []
  for module, pair in adapter.factors.items():
    theirs = pair["B"].shape[0], pair["A"].shape[1]
    ours = shapes.get(f"{module}.weight")
    if ours is None:
      told.append(f"{module}: the model has no such matrix")
    elif tuple(ours) != theirs:
      told.append(f"{module}: the adapter's is {theirs}, the model's {tuple(ours)}")
  if told:
    layers = {m.split("layers.")[-1].split(".")[0] for m in adapter.factors}
    raise ValueError(
      f"the adapter in {adapter.folder} is of another model than this one: "
      f"{len(told)} of its {len(adapter.factors)} matrices do not fit, and it has "
      f"{len(layers)} layers of width {_size(adapter)}:\n  "
      + "\n  ".join(told[:4])
      + f"\nGive this model's adapter, or the adapter's base ({adapter.base!r})."
    )


def _size(adapter: Adapter) -> str:
  """The variant that has an adapter's width, such as "llama 13b", or the width."""
  width = min(pair["A"].shape[1] for pair in adapter.factors.values())
  names = [n for n, shape in llama.VARIANTS.items() if shape["embed"] == width]
  return f"{width}, that of {names[0]}" if names else str(width)


def fold_adapter(tensors: Tensors, adapter: Adapter) -> Tensors:
  """The base's tensors with the adapter's updates in them, W + alpha/r B A.

  Still lazy: a part of a matrix needs the same part of the update only.
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

  changed = {
    f"{module}.weight": fold(tensors[f"{module}.weight"], pair["A"], pair["B"])
    for module, pair in adapter.factors.items()
  }
  return {**tensors, **changed, **adapter.rest}


def to_peft(lora: Params) -> dict[str, np.ndarray]:
  """The tensors of a PEFT adapter file: name -> one layer's factor.

  Args:
    lora: the collection "lora" of a language model.
  """
  return dict(param_mapping.to_hf(_FACTORS, lora))
