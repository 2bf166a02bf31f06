"""Reads and writes LoRA adapters in PEFT's format.

`read_adapter` opens an adapter, including the layouts of LLaVA and VLM-RLAIF.
`fold_adapter` adds it to a base checkpoint.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.huggingface import param_mapping, tensor_files
from vlmrlaif_jax.huggingface.adapter_config import (
  ADAPTER_CONFIG as ADAPTER_CONFIG,
)
from vlmrlaif_jax.huggingface.adapter_config import (
  AdapterConfig,
  read_adapter_config,
)
from vlmrlaif_jax.huggingface.checkpoint_folders import find_adapter as find_adapter
from vlmrlaif_jax.huggingface.tensor_files import Index, Tensor, Tensors
from vlmrlaif_jax.models.decoders import llama

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Names in the tables of a LLaVA and of the other families.
_EMBEDDINGS = {
  "language_model.model.embed_tokens.weight",
  "model.language_model.embed_tokens.weight",
}
_OUTPUTS = {"language_model.lm_head.weight", "lm_head.weight"}
# Module, A or B, and the name of the adapter, which some files include.
_FACTOR = re.compile(r"(.*)\.lora_([AB])\.(?:\w+\.)?weight")
_EMBEDDING_FACTOR = re.compile(r"(.*)\.lora_embedding_([AB])(?:\.\w+)?")
_MAGNITUDE = re.compile(r"(.*)\.lora_magnitude_vector(?:\.\w+)*")
# Parts of names that PEFT adds to modules which it wraps.
_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
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

# Returns arrays u and v, so that the update of a matrix is relative to W - u v.
Principal: TypeAlias = Callable[[], tuple[np.ndarray, np.ndarray]]


class Adapter(NamedTuple):
  """A LoRA adapter whose tensors are not read yet."""

  folder: Path
  config: AdapterConfig
  # Module name, as in make_llava_table -> "A" or "B" -> factor.
  factors: dict[str, dict[str, Tensor]]
  magnitudes: dict[str, Tensor]  # Module name -> norms of the rows, for DoRA.
  rest: dict[str, Tensor]  # Tensors that are trained whole, such as the projector.
  names: dict[str, str]  # Name of each module or whole tensor -> its name in PEFT.

  def describe(self) -> str:
    """Returns a note about the updates."""
    ranks = sorted({pair["A"].shape[0] for pair in self.factors.values()})
    flags = (
      ("rsLoRA", self.config.rslora),
      ("DoRA", self.config.dora),
      ({"pissa": "PiSSA", "olora": "OLoRA"}.get(self.config.init), self.config.init),
    )
    kinds = "".join(f" {name}" for name, is_set in flags if is_set)
    rank = "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
    return f"merged: rank {rank}{kinds} updates of {len(self.factors)} matrices"


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
  config = read_adapter_config(inner)
  weights = next((inner / name for name in _FILES if (inner / name).is_file()), None)
  if weights is None:
    raise FileNotFoundError(
      f"{inner} has a {ADAPTER_CONFIG}, but none of {_FILES}. Download the weights too."
    )
  adapter = Adapter(folder, config, {}, {}, {}, {})
  for path in (weights, *inner.glob("non_lora_trainables.bin")):
    for name, x in tensor_files.open_file(path).items():
      _add_tensor(adapter, name, x, rename)
  _check_factors(adapter)
  return adapter


def _add_tensor(
  adapter: Adapter, name: str, x: Tensor, rename: Callable[[str], str]
) -> None:
  """Adds a tensor of a file to the part of the adapter that it belongs to."""
  if match := _FACTOR.fullmatch(name):
    module, factor = rename(match[1] + ".weight"), match[2]
  elif match := _EMBEDDING_FACTOR.fullmatch(name):
    # An embedding is the transpose of a matrix, so its factors change places.
    module, factor = rename(match[1] + ".weight"), "BA"["AB".index(match[2])]
    x = _transpose(x)
  elif match := _MAGNITUDE.fullmatch(name):
    adapter.magnitudes[rename(match[1] + ".weight").removesuffix(".weight")] = x
    return
  elif ".lora_" in name or "trainable_tokens" in name:
    raise ValueError(
      f"the adapter in {adapter.folder} has the tensor {name}, which is not a factor "
      "of LoRA that is supported (lora_bias and trainable tokens are not). Merge it "
      "into its base with PEFT (merge_and_unload), and give that model."
    )
  else:
    plain = _WRAPPED.sub("", name)
    adapter.rest[rename(plain)] = x
    adapter.names[rename(plain)] = plain
    return
  module = module.removesuffix(".weight")
  adapter.factors.setdefault(module, {})[factor] = x
  adapter.names[module] = match[1].removeprefix("base_model.model.")


def _transpose(x: Tensor) -> Tensor:
  return Tensor(x.shape[::-1], x.dtype, lambda index: x[index[::-1]].T)


def _check_factors(adapter: Adapter) -> None:
  """Checks that every module has both factors, as the config describes them."""
  config, where = adapter.config, f"the adapter in {adapter.folder}"
  if not adapter.factors:
    raise ValueError(f"{where} contains no LoRA factors. Give another adapter.")
  for module, pair in adapter.factors.items():
    if set(pair) != {"A", "B"}:
      raise ValueError(
        f"{where} has only lora_{''.join(pair)} of {module}. Download its weights "
        "again."
      )
    a, b, name = pair["A"].shape, pair["B"].shape, adapter.names[module]
    rank = config.get_rank(name)
    if len(a) < 2 or len(b) < 2 or a[0] != rank or b[1] != rank:
      raise ValueError(
        f"{where} has rank {a[0]} ({module}: A {a}, B {b}), but its {ADAPTER_CONFIG} "
        f"has r={rank} for it. Give files of one adapter."
      )
    if not config.has_update(name):
      raise ValueError(
        f"{where} has factors of {name}, but target_modules, exclude_modules or "
        f"layers_to_transform of its {ADAPTER_CONFIG} exclude this module. Give the "
        "files of one adapter."
      )
  updated = set(adapter.factors) if config.dora else set()
  if updated != set(adapter.magnitudes):
    raise ValueError(
      f"{where} has {len(adapter.magnitudes)} magnitude vectors for "
      f"{len(adapter.factors)} matrices, but its {ADAPTER_CONFIG} has "
      f"use_dora={config.dora}. Give files of one adapter."
    )
  whole = [f".{adapter.names[name]}" for name in adapter.rest]
  lacking = [name for name in config.saved if not any(f".{name}." in x for x in whole)]
  if lacking:
    raise ValueError(
      f"{where} lacks the tensors of {lacking}, which modules_to_save of its "
      f"{ADAPTER_CONFIG} lists. Save it again with all trained weights."
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
      + f"\nGive this model's adapter, or the adapter's base ({adapter.config.base!r})."
    )


def _check_whole_tensors(adapter: Adapter, tensors: Tensors) -> None:
  """Checks that the model has the tensors that were trained whole, in their shapes."""
  for name, x in adapter.rest.items():
    shape = tuple(tensors[name].shape) if name in tensors else None
    if shape != tuple(x.shape) and name not in _OUTPUTS:
      raise ValueError(
        f"the adapter in {adapter.folder} replaces {adapter.names[name]} by a tensor "
        f"of shape {tuple(x.shape)}, but its base has "
        + (f"one of shape {shape}" if shape else "no such tensor")
        + ". Give the adapter's own base, or merge both with PEFT (merge_and_unload)."
      )


def _check_embeddings(adapter: Adapter, tensors: Tensors) -> None:
  """Checks that no update changes only one of two tied matrices."""
  changed = {f"{module}.weight" for module in adapter.factors} | set(adapter.rest)
  if not _OUTPUTS & set(tensors) and changed & (_EMBEDDINGS | _OUTPUTS):
    raise ValueError(
      f"the adapter in {adapter.folder} changes the embedding or lm_head, but in its "
      "base the lm_head is the embedding (tie_word_embeddings), so one would change "
      "both. Merge it into its base with PEFT (merge_and_unload), and give that model."
    )


def _format_width(adapter: Adapter) -> str:
  """Formats the width of an adapter, with the size of the LLaMA that has it."""
  width = min(pair["A"].shape[1] for pair in adapter.factors.values())
  names = [n for n, shape in llama.VARIANTS.items() if shape["embed"] == width]
  return f"{width} (LLaMA {names[0]})" if names else str(width)


def fold_adapter(tensors: Tensors, adapter: Adapter) -> Tensors:
  """Returns the base tensors plus the adapter's updates, W + scale B A.

  The result is lazy: a slice of a matrix computes only that slice of the update. DoRA
  needs complete rows for it. The residuals of PiSSA and OLoRA need the whole matrix,
  once.

  Args:
    tensors: Tensors of the base, by their names in make_llava_table.
    adapter: Adapter of this base. Its whole tensors replace those of the base.

  Raises:
    ValueError: The adapter does not fit the base.
  """
  _check_whole_tensors(adapter, tensors)
  tensors = {**tensors, **adapter.rest}
  _check_embeddings(adapter, tensors)
  check_adapter_fits(adapter, {name: x.shape for name, x in tensors.items()})
  updated: dict[str, Tensor] = {}
  for module, pair in adapter.factors.items():
    base, name = tensors[f"{module}.weight"], adapter.names[module]
    scale = adapter.config.get_scale(name)
    principal = None
    if adapter.config.init:
      rank = adapter.config.get_rank(name)
      split = {"pissa": _split_pissa, "olora": _split_olora}[adapter.config.init]
      principal = functools.cache(functools.partial(split, base, rank, scale))
    updated[f"{module}.weight"] = _fold(
      base, pair["A"], pair["B"], scale, adapter.magnitudes.get(module), principal
    )
  return {**tensors, **updated}


def _fold(
  base: Tensor | np.ndarray,
  a: Tensor,
  b: Tensor,
  scale: float,
  magnitude: Tensor | None,
  principal: Principal | None,
) -> Tensor:
  """Returns a matrix plus its update; see fold_adapter."""

  def read(index: Index) -> np.ndarray:
    rows, columns = index
    wide = columns if magnitude is None else slice(None)  # A norm is over whole rows.
    left, right = (x.astype(np.float32) for x in (b[rows, :], a[:, wide]))
    matrix = base[rows, wide].astype(np.float32) + scale * (left @ right)
    if principal is not None:
      u, v = principal()
      matrix -= u[rows] @ v[:, wide]
    if magnitude is not None:
      norms = np.linalg.norm(matrix, axis=1, keepdims=True)
      matrix *= magnitude[(rows,)].astype(np.float32)[:, None] / norms
      matrix = matrix[:, columns]
    return matrix.astype(base.dtype)

  return Tensor(base.shape, jnp.dtype(base.dtype), read)


def _split_pissa(
  base: Tensor | np.ndarray, rank: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the principal part of a matrix: Meng et al. 2024 (2404.02948), eq. 2."""
  del scale  # PEFT divides the factors by it.
  u, s, v = np.linalg.svd(base[:, :].astype(np.float32), full_matrices=False)
  return u[:, :rank] * s[:rank], v[:rank]


def _split_olora(
  base: Tensor | np.ndarray, rank: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the part of a matrix that OLoRA starts from: 2406.01775, algorithm 1."""
  q, r = np.linalg.qr(base[:, :].astype(np.float32))
  return scale * q[:, :rank], r[:rank]


def convert_to_peft(lora: Params) -> dict[str, np.ndarray]:
  """Converts LoRA factors to the tensors of a PEFT file.

  Args:
    lora: Factors of a language model, stacked over layers; see lora.join_lora.

  Returns:
    Tensor name -> factor of one layer.
  """
  return dict(param_mapping.convert_to_hf(_FACTORS, lora))


def save_adapter(
  folder: Path,
  tensors: Mapping[str, np.ndarray],
  *,
  base: str,
  target_modules: str | Sequence[str],
  modules_to_save: Sequence[str] | None = None,
) -> None:
  """Writes an adapter in PEFT's format, whose alpha is the rank.

  Args:
    folder: Output folder.
    tensors: Tensors by the names of `convert_to_peft`, and those of whole modules.
    base: Folder or Hub id of the base.
    target_modules: Names of the adapted modules, or a pattern of their paths.
    modules_to_save: Names of the modules that the adapter contains whole.
  """
  rank = next(x.shape[0] for name, x in tensors.items() if ".lora_A." in name)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(
    dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"}
  )
  settings = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": rank,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": target_modules,
    "modules_to_save": modules_to_save,
  }
  write_json(folder / ADAPTER_CONFIG, settings)
