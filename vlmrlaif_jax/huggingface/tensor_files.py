"""The tensors of checkpoint files: read slice by slice when asked for, and written."""

import contextlib
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlmrlaif_jax.core.files import read_json, write_json

Index: TypeAlias = tuple[slice, ...]  # One for each axis.

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
  """A tensor that lies elsewhere; tensor[index] fetches a part, as of an array."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def __getitem__(self, index: Index) -> np.ndarray:
    return self.read(index)


Tensors: TypeAlias = Mapping[str, Tensor | np.ndarray]  # By name.


# Reading.


def open_folder(folder: Path) -> dict[str, Tensor]:
  """The tensors of a model's files: safetensors or, where there are none, .bin.

  Raises:
    FileNotFoundError: no such file is there, or a part of a set is missing.
    ValueError: a file is cut short, or lacks what the index says it holds.
  """
  for index, pattern in (
    ("model.safetensors.index.json", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
  ):
    found = sorted(folder.glob(pattern))
    listed = {}
    if (folder / index).exists():
      listed = read_json(folder / index)["weight_map"]
    if not found and not listed:
      continue
    _check_all_there(folder, {path.name for path in found}, set(listed.values()))
    paths = sorted(folder / name for name in set(listed.values())) or found
    tensors = {name: x for path in paths for name, x in open_file(path).items()}
    lost = sorted(set(listed) - set(tensors))
    if lost:
      raise ValueError(
        f"{folder / index} names {len(lost)} tensors that its files do not hold, "
        f"such as {lost[:3]}: fetch the checkpoint again"
      )
    return tensors
  raise FileNotFoundError(
    f"no model*.safetensors file in {folder}, nor pytorch_model*.bin"
  )


def _check_all_there(folder: Path, found: set[str], listed: set[str]) -> None:
  """Refuses a set of files of which the index or their own names tell that it is not
  whole, such as model-00001-of-00003.safetensors alone.
  """
  wanted = set(listed)
  for name in found:
    if numbered := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name):
      start, digits, count, end = numbered.groups()
      width = len(digits)
      wanted |= {f"{start}{i + 1:0{width}}-of-{count}{end}" for i in range(int(count))}
  missing = sorted(wanted - found)
  if missing:
    raise FileNotFoundError(
      f"{folder} lacks {len(missing)} of its {len(wanted)} files of weights: "
      f"{missing}; fetch them too"
    )


def open_file(path: Path) -> dict[str, Tensor]:
  """The tensors of a safetensors file, or else of one that torch.save wrote."""
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  return _open_torch(path)


def _open_safetensors(path: Path) -> dict[str, Tensor]:
  try:
    with safe_open(path, framework="numpy") as file:
      names = file.keys()
      parts = {name: file.get_slice(name) for name in names}
      heads = {n: (tuple(x.get_shape()), x.get_dtype()) for n, x in parts.items()}
  except SafetensorError as error:
    raise ValueError(
      f"{path} is cut short or is no safetensors file ({error}): fetch it again"
    ) from error
  strange = sorted({kind for _, kind in heads.values()} - set(_DTYPES))
  if strange:
    raise ValueError(
      f"{path} holds numbers of type {strange}; give a checkpoint of {list(_DTYPES)}"
    )

  def tensor(name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    def read(index: Index) -> np.ndarray:
      # The file is mapped into memory, and what has been read of it stays there until
      # it is closed. So it is opened for each part.
      with safe_open(path, framework="numpy") as file:
        return file.get_slice(name)[index] if shape else file.get_tensor(name)

    return Tensor(shape, jnp.dtype(_DTYPES[kind]), read)

  return {name: tensor(name, *head) for name, head in heads.items()}


def _open_torch(path: Path) -> dict[str, Tensor]:
  """Reads no pickle that could run code: torch takes tensors and plain values only."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path} was written by PyTorch, which is needed to read it: pip install torch; "
      "or give the checkpoint as safetensors"
    ) from error
  try:
    # Files of old versions of torch, which are no archives, cannot be mapped.
    held = torch.load(
      path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
    )
  except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
    raise ValueError(
      f"{path} is cut short, or holds more than tensors, which is not read because it "
      f"may run code ({str(error).splitlines()[0]}): fetch it again, or give the "
      "checkpoint as safetensors"
    ) from error
  if not all(isinstance(x, torch.Tensor) for x in held.values()):
    raise ValueError(f"{path} must hold tensors by name, and does not")

  def tensor(x: "torch.Tensor") -> Tensor:
    def read(index: Index) -> np.ndarray:
      part = x.detach()[index].contiguous()
      if part.dtype == torch.bfloat16:  # NumPy has no such type of its own.
        return part.view(torch.int16).numpy().view(jnp.bfloat16)
      return part.numpy()

    dtype = jnp.dtype(str(x.dtype).removeprefix("torch."))
    return Tensor(tuple(x.shape), dtype, read)

  return {name: tensor(x) for name, x in held.items()}


@contextlib.contextmanager
def show_read_progress(total: int) -> Iterator[Callable[[int], None]]:
  """A bar in a terminal, with GB and GB/s; yields what takes the bytes that came."""
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
  """model.safetensors or, beyond `limit` bytes, a numbered set of files and its index.

  Holds one file's tensors at a time. The files of an earlier set are removed.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob("model*.safetensors*"):
    old.unlink()
  sets: list[tuple[Path, list[str]]] = []
  part: dict[str, np.ndarray] = {}
  size = total = 0

  def flush() -> None:
    path = folder / f"{len(sets)}.part"
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
