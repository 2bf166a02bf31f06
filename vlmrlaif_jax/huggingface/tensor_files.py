"""Reads and writes the tensor files of checkpoints.

`open_folder` opens safetensors or PyTorch files without reading them. Indexing a
`Tensor` reads the slice. `write_folder` writes safetensors files.
"""

import contextlib
import math
import pickle
import re
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.huggingface.config_keys import read_json_object

Index: TypeAlias = tuple[slice, ...]  # One slice per axis.

SAFE_TORCH = (2, 6)  # First version of PyTorch whose `weights_only` is safe.
MAX_TENSORS = 50_000  # Tensors of a checkpoint; published ones have up to 1500.
_COUNT_DIGITS = 4  # Digits of the largest number of files of a checkpoint.
_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U8": "uint8",
  "BOOL": "bool",
}


@dataclass(frozen=True)
class Tensor:
  """A tensor in a file; `tensor[index]` reads a slice."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]  # Reads a slice.

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize

  def __getitem__(self, index: Index) -> np.ndarray:
    return self.read(index)


# Bits of the exponent, which are all set in NaN and infinity. NumPy's functions take
# longer for these dtypes.
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00}
_ALIGNMENT = 64  # JAX on CPU uses a NumPy array without a copy at such an address.
# Files that write_folder writes.
_WRITTEN = re.compile(
  r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json"
)
Tensors: TypeAlias = Mapping[str, Tensor | np.ndarray]  # Name -> tensor.


# Reading.


def open_folder(folder: Path) -> dict[str, Tensor]:
  """Opens the safetensors files of a folder, or its .bin files if it has none.

  Returns:
    Name -> tensor. No values are read yet.

  Raises:
    FileNotFoundError: The folder has no tensor files, or lacks some of a set.
    ValueError: A file is truncated, or lacks tensors that the index lists.
  """
  for index, pattern in (
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
  ):
    existing = sorted(folder.glob(pattern))
    listed: dict[str, str] = {}
    if (folder / index).exists():
      listed = _read_weight_map(folder / index)
    if not existing and not listed:
      continue
    _check_complete(folder, {path.name for path in existing}, set(listed.values()))
    paths = sorted(folder / name for name in set(listed.values())) or existing
    tensors: dict[str, Tensor] = {}
    for path in paths:
      tensors |= open_file(path)
      _check_count(path, len(tensors))
    missing = sorted(set(listed) - set(tensors))
    if missing:
      raise ValueError(
        f"{folder / index} lists {len(missing)} tensors that the files do not contain, "
        f"such as {missing[:3]}. Download the checkpoint again."
      )
    return tensors
  raise FileNotFoundError(
    f"no model*.safetensors or pytorch_model*.bin file in {folder}. Give the folder of "
    "a complete checkpoint."
  )


def _read_weight_map(path: Path) -> dict[str, str]:
  """Reads which file of a set contains each tensor."""
  names = read_json_object(path).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
    raise ValueError(
      f"{path}: weight_map must map tensor names to file names. Download it again."
    )
  return names


def _check_complete(folder: Path, existing: set[str], listed: set[str]) -> None:
  """Checks that no file of a numbered or indexed set is missing.

  The name model-00001-of-00003.safetensors, for example, implies three files.
  """
  required = set(listed)
  for name in existing:
    if numbered := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name):
      start, digits, count, end = numbered.groups()
      width = len(digits)
      if len(count.lstrip("0")) > _COUNT_DIGITS:
        raise ValueError(
          f"{folder / name} is named as one of {count} files. Rename it, or download "
          "the checkpoint again."
        )
      required |= {
        f"{start}{i + 1:0{width}}-of-{count}{end}" for i in range(int(count))
      }
  missing = sorted(required - existing)
  if missing:
    raise FileNotFoundError(
      f"{folder} lacks {len(missing)} of its {len(required)} weight files: {missing}. "
      "Download them into this folder."
    )


def open_file(path: Path) -> dict[str, Tensor]:
  """Opens a safetensors file, or a file that torch.save wrote.

  Returns:
    Name -> tensor.

  Raises:
    ImportError: The file is PyTorch's, and PyTorch is not installed.
    ValueError: The file is truncated, or contains more than tensors, or empty ones.
      A slice with a value that is not finite raises it when it is read.
  """
  if path.exists() and not path.is_file():
    raise ValueError(f"{path} is not a regular file. Give the folder of a checkpoint.")
  open_tensors = _open_safetensors if path.suffix == ".safetensors" else _open_torch
  tensors = open_tensors(path)
  empty = [name for name, x in tensors.items() if 0 in x.shape]
  if empty:
    raise ValueError(
      f"{path} has {len(empty)} empty tensors, such as {empty[0]}. DeepSpeed ZeRO-3 "
      "writes them when it saves without gathering the weights. Save again with "
      "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py."
    )
  return {name: _check_values(path, name, x) for name, x in tensors.items()}


def _check_values(path: Path, name: str, tensor: Tensor) -> Tensor:
  """Returns a tensor whose slices raise ValueError if a value is not finite."""

  def read(index: Index) -> np.ndarray:
    values = tensor.read(index)
    if not is_finite(values):
      raise ValueError(
        f"{path}: the tensor {name} contains NaN or infinity. Download the file again, "
        "or give a checkpoint from before the training diverged."
      )
    return values

  return replace(tensor, read=read)


def is_finite(x: np.ndarray) -> bool:
  """Returns whether no value is NaN or infinite.

  >>> is_finite(np.float32([1, 2])), is_finite(np.array([1, np.inf], jnp.bfloat16))
  (True, False)
  """
  bits = _EXPONENTS.get(x.dtype.name)
  if bits is None:
    return bool(np.isfinite(x).all())
  return bool(((x.view(np.uint16) & np.uint16(bits)) != bits).all())


def _open_safetensors(path: Path) -> dict[str, Tensor]:
  try:
    with safe_open(path, framework="numpy") as file:
      names = file.keys()
      _check_count(path, len(names))
      parts = {name: file.get_slice(name) for name in names}
      heads = {n: (tuple(x.get_shape()), x.get_dtype()) for n, x in parts.items()}
  except SafetensorError as error:
    raise ValueError(
      f"{path} is truncated or is not a safetensors file ({error}). Download it again."
    ) from error
  unsupported = sorted({dtype for _, dtype in heads.values()} - set(_DTYPES))
  if unsupported:
    raise ValueError(
      f"{path} contains the dtypes {unsupported}; supported are {list(_DTYPES)}. "
      "Convert the checkpoint."
    )

  def make_tensor(name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    def read(index: Index) -> np.ndarray:
      # A mapped file keeps the pages that were read in memory until it is closed, so
      # each slice opens the file again.
      with safe_open(path, framework="numpy") as file:
        return file.get_slice(name)[index] if shape else file.get_tensor(name)

    return Tensor(shape, jnp.dtype(_DTYPES[dtype]), read)

  return {name: make_tensor(name, *head) for name, head in heads.items()}


def _check_count(path: Path, count: int) -> None:
  if count > MAX_TENSORS:
    raise ValueError(
      f"{path} and the files before it have {count} tensors; at most {MAX_TENSORS} are "
      "read. Give another checkpoint."
    )


def _open_torch(path: Path) -> dict[str, Tensor]:
  """Opens a PyTorch file; `weights_only` prevents pickles from running code."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path} requires PyTorch, which is not installed. Run `pip install torch`, or "
      "convert the checkpoint to safetensors."
    ) from error
  check_torch(torch.__version__)
  try:
    # Old versions of torch write no zip archives, and only archives can be mapped.
    loaded = torch.load(
      path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
    )
  except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
    raise ValueError(
      f"{path} is truncated, or contains objects other than tensors, which may run "
      f"code ({str(error).splitlines()[0]}). Download it again, or convert the "
      "checkpoint to safetensors."
    ) from error
  if not isinstance(loaded, dict) or not all(
    isinstance(x, torch.Tensor) for x in loaded.values()
  ):
    raise ValueError(f"{path} must contain a dict of tensors. Give a weights file.")

  def make_tensor(x: "torch.Tensor") -> Tensor:
    def read(index: Index) -> np.ndarray:
      part = x.detach()[index].contiguous()
      if part.dtype == torch.bfloat16:  # torch cannot convert bfloat16 to NumPy.
        return part.view(torch.int16).numpy().view(jnp.bfloat16)
      return part.numpy()

    dtype = jnp.dtype(str(x.dtype).removeprefix("torch."))
    return Tensor(tuple(x.shape), dtype, read)

  return {name: make_tensor(x) for name, x in loaded.items()}


def check_torch(version: str) -> None:
  """Checks that a version of PyTorch reads pickles of others without running code.

  Raises:
    ImportError: `weights_only` of the version runs code (CVE-2025-32434).
  """
  if tuple(map(int, version.split(".")[:2])) < SAFE_TORCH:
    raise ImportError(
      f"torch {version} may run code of a .bin file. Run `pip install -U torch` to "
      "install 2.6 or later, or convert the checkpoint to safetensors."
    )


def allocate_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an empty array that a CPU device can use without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  buffer = np.empty(size + _ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % _ALIGNMENT
  return buffer[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def show_read_progress(total: int) -> Iterator[Callable[[int], None]]:
  """Shows a progress bar for `total` bytes if stderr is a terminal.

  Yields:
    A function that advances the bar by a number of bytes.
  """
  columns = ("loading", BarColumn(), DownloadColumn(), TransferSpeedColumn())
  with Progress(
    *columns,
    console=Console(stderr=True),
    transient=True,
    disable=not sys.stderr.isatty(),
  ) as bar:
    task = bar.add_task("loading", total=total)
    yield lambda count: bar.advance(task, count)


# Writing.


def write_folder(
  folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, limit: int = 5 * 10**9
) -> None:
  """Writes model.safetensors, or a numbered set of files and their index.

  The function keeps the tensors of one file in memory at a time. It removes the files
  of an earlier call, and no others.

  Args:
    folder: Output folder, created if it does not exist.
    tensors: Pairs of name and values.
    limit: Largest size of a file, in bytes. A larger tensor has a file of its own.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.iterdir():
    if _WRITTEN.fullmatch(old.name):
      old.unlink()
  sets: list[tuple[Path, list[str]]] = []
  part: dict[str, np.ndarray] = {}
  size = total = 0

  def flush() -> None:
    path = folder / f"{uuid.uuid4().hex}.part"  # No file or link has this name.
    save_file(part, path, metadata={"format": "pt"})
    sets.append((path, list(part)))

  for name, x in tensors:
    if part and size + x.nbytes > limit:
      flush()
      part, size = {}, 0
    part[name] = np.asarray(x, order="C")
    size, total = size + x.nbytes, total + x.nbytes
  flush()
  if len(sets) == 1:
    sets[0][0].rename(folder / "model.safetensors")
    return
  weight_map: dict[str, str] = {}
  for i, (path, names) in enumerate(sets):
    file = f"model-{i + 1:05}-of-{len(sets):05}.safetensors"
    path.rename(folder / file)
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(folder / "model.safetensors.index.json", index)
