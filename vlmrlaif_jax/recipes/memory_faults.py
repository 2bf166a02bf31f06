"""Exhausted memory of a host or a device, as one message.

The message names the stage and the step, what holds memory, and settings that need
less. The same command would fail again, so that the exit code is that of a user error.
"""

import contextlib
import errno
import math
import os
import re
import resource
from collections import Counter
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import UserError, iterate_causes, list_places
from vlmrlaif_jax.planner.topologies import GIB
from vlmrlaif_jax.stages.stage import get_stage

# Messages of XLA and of its allocators. Orbax has RESOURCE_EXHAUSTED for a full disk.
DEVICE_TEXT = re.compile(r"RESOURCE_EXHAUSTED.*([Oo]ut of memory|memory space)", re.S)
NUM_LARGEST = 3  # Arrays that a message lists.
MAX_ERROR_CHARS = 160  # Characters of the error.


class OutOfMemoryError(UserError):
  """An error because the memory of the host or of a device is exhausted."""


@contextlib.contextmanager
def explain_exhaustion(config: ConfigDict, stage: str) -> Iterator[None]:
  """Turns an error about exhausted memory into OutOfMemoryError.

  Args:
    config: The recipe.
    stage: The stage that runs; "" while models and data are loaded.

  Raises:
    OutOfMemoryError: Memory is exhausted. Other errors pass unchanged.
  """
  try:
    yield
  except Exception as error:
    causes = list(iterate_causes(error))
    exhaustion = next(filter(is_exhaustion, causes), None)
    if exhaustion is None or isinstance(error, OutOfMemoryError):
      raise
    place = ", ".join([stage or "loading of models and data", *list_places(error)])
    kind = "host" if is_host_error(exhaustion) else "device"
    cause = (
      next(iter(str(exhaustion).splitlines()), "")[:MAX_ERROR_CHARS]
      or type(exhaustion).__name__
    )
    raise OutOfMemoryError(
      f"{place}: the memory of the {kind} is exhausted ({cause}). {describe_use()}. "
      "The same command fails again: first "
      f"{list_remedies(config, stage, kind)}. What is saved stays, and the run then "
      "resumes. `python launch/plan.py` estimates the memory of other settings"
    ) from error


def is_exhaustion(error: BaseException) -> bool:
  """Returns whether an error is about exhausted memory of the host or a device."""
  is_no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
  is_text = DEVICE_TEXT.search(str(error)) or "std::bad_alloc" in str(error)
  return isinstance(error, MemoryError) or is_no_memory or bool(is_text)


def is_host_error(error: BaseException) -> bool:
  """Returns whether an error of `is_exhaustion` is about the memory of the host."""
  is_text = DEVICE_TEXT.search(str(error))
  return not is_text or jax.local_devices()[0].platform == "cpu"


def describe_use() -> str:
  """Describes what holds memory: this process, its devices and its largest arrays."""
  parts = [f"This process holds {_read_resident() / GIB:.2f} GiB"]
  soft, _ = resource.getrlimit(resource.RLIMIT_AS)
  if soft != resource.RLIM_INFINITY:
    parts.append(f"ulimit -v allows {soft / GIB:.2f} GiB of addresses")
  parts += [
    f"{device} holds {stats['bytes_in_use'] / GIB:.2f} of "
    f"{stats['bytes_limit'] / GIB:.2f} GiB"
    for device in jax.local_devices()
    if (stats := device.memory_stats()) and "bytes_limit" in stats
  ]
  arrays = Counter(f"{x.dtype.name}{list(x.shape)}" for x in jax.live_arrays())
  sizes = {f"{x.dtype.name}{list(x.shape)}": x.nbytes for x in jax.live_arrays()}
  total = math.fsum(sizes[name] * count for name, count in arrays.items())
  largest = sorted(arrays, key=lambda name: -sizes[name] * arrays[name])[:NUM_LARGEST]
  listed = ", ".join(f"{arrays[name]} x {name}" for name in largest)
  parts.append(f"arrays hold {total / GIB:.2f} GiB, most of it {listed or 'none'}")
  return "; ".join(parts)


def _read_resident() -> int:
  """Returns the bytes of host memory that this process holds; 0 if unknown."""
  try:
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except OSError:
    return 0


def list_remedies(config: ConfigDict, stage: str, kind: str) -> str:
  """Lists settings that need less memory and may change when the run resumes.

  Args:
    config: The recipe.
    stage: The stage that runs; "" while models and data are loaded.
    kind: "host" or "device".
  """
  remedies = []
  section = get_stage(stage).section if stage else ""
  settings = config[section] if section else ConfigDict()
  if "microbatches" in settings:
    remedies.append(f"raise --config.{section}.microbatches ({settings.microbatches})")
  if "batch" in settings:
    remedies.append(f"lower --config.{section}.batch ({settings.batch})")
  if "chunk" in settings:
    remedies.append(f"lower --config.{section}.chunk ({settings.chunk})")
  if config.model.remat != "full":
    remedies.append("set --config.model.remat=full")
  if kind == "host":
    for name in ("features_memory_gb", "workers"):
      remedies.append(f"lower --config.data.{name} ({config.data[name]})")
    remedies.append("end other programs or raise the memory limit")
  else:
    remedies.append("use more devices with a larger --config.mesh.fsdp")
  fixed = (
    [f"a smaller --config.{section}.batch_size"] if "batch_size" in settings else []
  )
  fixed += ["--config.model.dtype=bfloat16"] if config.model.dtype == "float32" else []
  fixed += ["--config.model.quant=nf4"] if config.model.quant == "none" else []
  other = f" (in another --workdir also {', '.join(fixed)})" if fixed else ""
  return ", ".join(remedies[:-1]) + f" or {remedies[-1]}{other}"
