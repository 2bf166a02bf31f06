"""Settings that may change when a run is resumed.

They select devices, batch sizes, kernels, and how often a run saves and logs. A change
affects only rounding, because sums are computed in another order.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.core.files import flatten_settings

# Settings of sending requests to an endpoint; its model and prompts are fixed.
_REQUEST_SETTINGS = "key_env concurrency timeout_s retries max_failed".split()
_SERVER_SETTINGS = "urls concurrency timeout_s patience_s allow_remote".split()
FREE_SETTINGS = (  # Patterns of fnmatch, whose * also matches dots.
  # The list of stages: a stage that is done does not run again.
  *("recipe", "stages", "preset", "rounds"),
  "evaluate.names",  # Benchmarks do not depend on each other.
  # Devices, kernels and memory.
  "mesh.*",
  *("model.attention", "model.remat"),
  *("model.size", "model.reward_model_size"),
  *("*.microbatches", "*.chunk", "*.slots", "*.shared_prefix", "*.pack_len"),
  *("data.workers", "data.timeout_s"),
  "data.allow_outside",  # The content of all videos is compared.
  *("data.features", "data.features_memory_gb"),
  # Batch sizes: the random key of a row follows from its id. label.block is fixed,
  # because it numbers files.
  *("*.batch", "claims.block", "claims.check_rows"),
  *(f"*.endpoint.{name}" for name in _REQUEST_SETTINGS),
  # Servers that sample; which engine does is fixed.
  *(f"*.rollout.{name}" for name in _SERVER_SETTINGS),
  *("reward.concurrency", "reward.timeout_s", "reward.max_invalid"),
  # Alarms, logging, measurements and checkpoints.
  *("*.alarms.*", "*.log_every", "*.samples_every", "rm.measure_every"),
  *("*.save_every", "*.keep"),
)
# Exceptions: these determine the checkpoints that dpo.select chooses from.
FIXED_SETTINGS = ("dpo.save_every", "dpo.keep")


def is_free(key: str) -> bool:
  """Returns whether a setting may be changed when a run is resumed.

  >>> is_free("ppo.log_every"), is_free("ppo.kl_coef")
  (True, False)
  """
  fits = any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE_SETTINGS)
  return fits and key not in FIXED_SETTINGS


def is_unused_server(key: str, before: Mapping[str, Any]) -> bool:
  """Returns whether a setting is of a judge's server that no stage has queried.

  Such a server has no url in the config of the workdir. A url in a term of the reward
  counts, because the term reads the other settings of `reward.endpoint`.

  >>> is_unused_server("label.endpoint.model", {"label": {"endpoint": {"url": ""}}})
  True

  Args:
    key: Dotted name of the setting.
    before: The config of the workdir.
  """
  place, is_server, _ = key.rpartition(".endpoint.")
  urls = [
    value
    for name, value in flatten_settings(before).items()
    if name.startswith(f"{place}.") and name.endswith(".url")
  ]
  return bool(is_server) and not any(urls)


def select_fixed_settings(section: ConfigDict, at: str) -> dict[str, Any]:
  """Returns the settings of a section that must not change, keyed by full name.

  Args:
    section: a section of a config.
    at: the section's full name, such as "label.endpoint".
  """
  fixed: dict[str, Any] = {}
  for name, value in sorted(section.items()):
    key = f"{at}.{name}"
    if isinstance(value, ConfigDict):
      fixed |= select_fixed_settings(value, key)
    elif not is_free(key):
      fixed[key] = value
  return fixed
