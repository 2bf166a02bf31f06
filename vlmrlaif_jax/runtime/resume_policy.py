"""Which settings may change while a run goes on: no result depends on them.

What they change is how it is computed: on which devices, in which parts, how often it
is saved and told of. Sums in another order round otherwise, and nothing else differs.
"""

import fnmatch
from typing import Any

from ml_collections import ConfigDict

# Of endpoints: whom a query is sent to, and what is said, stays.
_ASKING = "key_env concurrency timeout_s retries".split()
FREE_SETTINGS = (  # Patterns of fnmatch, whose * takes dots as well.
  # Which stages run; those that are done are not run again.
  *("recipe", "stages", "preset", "rounds"),
  "evaluate.names",  # Each benchmark is for itself.
  # Devices, kernels, memory.
  "mesh.*",
  *("model.attention", "model.remat"),
  *("model.size", "model.reward_model_size"),
  *("*.microbatches", "*.chunk", "*.slots", "*.shared_prefix", "*.pack_len"),
  *("data.workers", "data.timeout_s"),
  *("data.features", "data.features_memory_gb"),
  # Rows at once: what is sampled for a row follows from its id. Not label.block, which
  # its files are numbered by.
  *("*.batch", "claims.block", "claims.check_rows"),
  *(f"*.endpoint.{name}" for name in _ASKING),
  # What is told, measured beside and kept.
  *("*.alarms.*", "*.log_every", "*.samples_every", "rm.measure_every"),
  *("*.save_every", "*.keep"),
)
# What dpo.select chooses from.
FIXED_SETTINGS = ("dpo.save_every", "dpo.keep")


def is_free(key: str) -> bool:
  """Whether a setting, as a.b.c, may change while a run goes on."""
  fits = any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE_SETTINGS)
  return fits and key not in FIXED_SETTINGS


def select_fixed_settings(section: ConfigDict, at: str) -> dict[str, Any]:
  """The settings of a section that its results depend on, by their whole names.

  Args:
    at: the section's own name, as a.b.
  """
  found: dict[str, Any] = {}
  for name, value in sorted(section.items()):
    key = f"{at}.{name}"
    if isinstance(value, ConfigDict):
      found |= select_fixed_settings(value, key)
    elif not is_free(key):
      found[key] = value
  return found
