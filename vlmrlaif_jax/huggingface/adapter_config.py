"""Reads adapter_config.json of PEFT and checks each of its keys.

`read_adapter_config` is the main function. A key is respected, or cannot change the
result of a trained adapter, or is an error that names it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmrlaif_jax.huggingface.config_keys import read_json_object

ADAPTER_CONFIG = "adapter_config.json"
# Keys that cannot change the result. The configs of initializations apply only to new
# adapters: init_lora_weights states which one was used. PEFT ignores fan_in_fan_out for
# linear layers, and there are no others here.
_HARMLESS = set(
  "auto_mapping corda_config eva_config fan_in_fan_out inference_mode loftq_config "
  "lora_dropout lora_ga_config megatron_core peft_version qalora_group_size "
  "runtime_config task_type".split()
)
# Keys that are respected, or required to have a supported value.
_READ = set(
  "alpha_pattern base_model_name_or_path bias exclude_modules init_lora_weights "
  "layers_pattern layers_to_transform lora_alpha modules_to_save peft_type r "
  "rank_pattern revision target_modules use_dora use_rslora".split()
)
# Initializations that do not change the weights of the base.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# Initializations that subtract a part of each matrix, which the matrix determines.
_RESIDUAL_INITS = ("pissa", "olora")
_MERGE = "Merge it into its base with PEFT (merge_and_unload), and give that model."


class AdapterConfig(NamedTuple):
  """Settings of a LoRA adapter. Patterns are PEFT's, over its module names."""

  base: str = ""  # Folder or Hub name of the base model; "" if unknown.
  rank: int = 8
  alpha: float = 8.0
  rank_pattern: Mapping[str, int] = {}  # Pattern of modules -> their rank.
  alpha_pattern: Mapping[str, float] = {}  # Pattern of modules -> their alpha.
  rslora: bool = False  # Divides alpha by the root of the rank: 2312.03732, eq. 8.
  dora: bool = False  # Scales each row to a trained norm: 2402.09353, eq. 5.
  init: str = ""  # "pissa" or "olora" if the update is relative to a residual.
  saved: tuple[str, ...] = ()  # modules_to_save: names of modules trained whole.
  targets: str | tuple[str, ...] | None = None  # Pattern or names; None if unknown.
  excluded: str | tuple[str, ...] = ()  # The same, of modules without updates.
  layers: tuple[int, ...] | None = None  # Layers with updates; None for all.
  layers_pattern: tuple[str, ...] = ()  # Names of the lists of layers.
  notes: tuple[str, ...] = ()  # Keys that are not used, for the log.

  def get_rank(self, module: str) -> int:
    """Returns the rank of a module."""
    return self.rank_pattern.get(_match(self.rank_pattern, module), self.rank)

  def get_scale(self, module: str) -> float:
    """Returns the factor of a module's update B A."""
    alpha = self.alpha_pattern.get(_match(self.alpha_pattern, module), self.alpha)
    rank = self.get_rank(module)
    return alpha / (math.sqrt(rank) if self.rslora else rank)

  def has_update(self, module: str) -> bool:
    """Returns whether PEFT would apply an update to a module."""
    if self.excluded and _is_named(self.excluded, module):
      return False
    if self.targets is None or self.targets == "all-linear":
      return True
    if not _is_named(self.targets, module):
      return False
    if self.layers is None or isinstance(self.targets, str) or module in self.targets:
      return True
    lists = self.layers_pattern or ("[^.]*",)
    matches = (re.match(rf".*\.{name}\.(\d+)\.", f".{module}") for name in lists)
    return any(match is not None and int(match[1]) in self.layers for match in matches)


def _match(patterns: Mapping[str, Any], module: str) -> str:
  """Returns the first pattern that matches the end of a module's name, or ""."""
  return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), "")


def _is_named(names: str | tuple[str, ...], module: str) -> bool:
  """Returns whether a pattern matches a module, or its name ends with a given one."""
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(f".{module}".endswith(f".{name}") for name in names)


def read_adapter_config(folder: Path) -> AdapterConfig:
  """Reads the config of an adapter.

  Raises:
    ValueError: It is not LoRA, or a key is not supported or has an invalid value. The
      message names the key and its value.
  """
  path = folder / ADAPTER_CONFIG
  config = read_json_object(path)
  kind = config.get("peft_type", "LORA")
  if kind != "LORA":
    raise ValueError(
      f'{path}: peft_type must be "LORA", got {kind!r}: only adapters of LoRA are '
      f"supported. {_MERGE}"
    )
  for key, value in config.items():
    if key not in _HARMLESS | _READ and value not in (None, False, "", [], {}):
      raise ValueError(f"{path}: {key}={value!r} is not supported. {_MERGE}")
  try:
    return _parse(config)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _parse(config: Mapping[str, Any]) -> AdapterConfig:
  missing = [key for key in ("r", "lora_alpha") if config.get(key) is None]
  if missing:
    raise ValueError(f"the keys {missing} are missing. Give an adapter of LoRA.")
  init = config.get("init_lora_weights", True)
  if init not in _PLAIN_INITS and init not in _RESIDUAL_INITS:
    raise ValueError(
      f"init_lora_weights={init!r} changed the weights of the base in a way that its "
      "files do not determine. Save the adapter again with PEFT's save_pretrained(..., "
      "path_initial_model_for_weight_conversion=...). Or merge it with PEFT."
    )
  if (bias := config.get("bias", "none")) not in ("none", "all", "lora_only"):
    raise ValueError(f'bias must be "none", "all" or "lora_only", got {bias!r}')
  layers = config.get("layers_to_transform")
  if isinstance(layers, int) and not isinstance(layers, bool):
    layers = [layers]
  targets = _read_names(config, "target_modules")
  revision = config.get("revision")
  return AdapterConfig(
    base=_check(config, "base_model_name_or_path", str, ""),
    rank=_check_rank("r", config["r"]),
    alpha=_check_number("lora_alpha", config["lora_alpha"]),
    rank_pattern=_read_pattern(config, "rank_pattern", _check_rank),
    alpha_pattern=_read_pattern(config, "alpha_pattern", _check_number),
    rslora=_check(config, "use_rslora", bool, False),
    dora=_check(config, "use_dora", bool, False),
    init=init if init in _RESIDUAL_INITS else "",
    saved=tuple(_check(config, "modules_to_save", list, [])),
    targets=targets or None,
    excluded=_read_names(config, "exclude_modules"),
    layers=None if layers is None else tuple(_check_list(layers)),
    layers_pattern=_as_tuple(_read_names(config, "layers_pattern")),
    notes=(f"revision={revision!r} of the base is not checked",) if revision else (),
  )


def _check(config: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
  """Returns the value of a key, or the default if it is missing or null."""
  value = config.get(key)
  if value is None:
    return default
  if not isinstance(value, kind):
    raise ValueError(f"{key} must be of type {kind.__name__}, got {value!r}")
  return value


def _check_rank(key: str, value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f"{key} must be a positive integer, got {value!r}")
  return value


def _check_number(key: str, value: Any) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    raise ValueError(f"{key} must be a number, got {value!r}")
  return float(value)


def _check_list(layers: Any) -> list[int]:
  if not isinstance(layers, list) or not all(isinstance(i, int) for i in layers):
    raise ValueError(
      f"layers_to_transform must be an integer or a list of integers, got {layers!r}"
    )
  return layers


def _read_pattern(config, key, check) -> dict[str, Any]:
  pattern = _check(config, key, dict, {})
  for name in pattern:
    _check_pattern(key, name)
  return {name: check(f"{key}.{name}", value) for name, value in pattern.items()}


def _check_pattern(key: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"{key}: {pattern!r} is not a regular expression ({error})"
    ) from error


def _read_names(config, key) -> str | tuple[str, ...]:
  """Reads a pattern, or names; () if the key is missing."""
  value = config.get(key)
  if value is None:
    return ()
  if isinstance(value, str):
    if value != "all-linear":
      _check_pattern(key, value)
    return value
  if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
    raise ValueError(f"{key} must be a pattern or a list of names, got {value!r}")
  return tuple(value)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else names
