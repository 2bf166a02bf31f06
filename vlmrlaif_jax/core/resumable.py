"""A cache of computed rows on disk, so that a killed computation can resume."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from vlmrlaif_jax.core import distributed, jsonl
from vlmrlaif_jax.core.types import Params

Row: TypeAlias = dict[str, Any]  # Values that JSON can represent.


def load_or_compute(
  path: pathlib.Path,
  make: Callable[[range], list[Row]],
  *,
  count: int,
  batch: int,
  fingerprint: str,
  on_progress: Callable[[int], None] = lambda done: None,
) -> list[Row]:
  """Returns `count` rows: the cached ones, and the others newly computed.

  The first line of the file is the fingerprint of everything that the rows depend on.
  If the fingerprint differs, all rows are computed again.

  Args:
    path: JSON Lines file, written by process 0.
    make: Computes the rows of a range, at most `batch`. The file grows by batches.
    count: Number of rows.
    batch: Rows computed together.
    fingerprint: Hash of everything that the rows depend on.
    on_progress: Receives the number of finished rows after each batch.
  """
  head = {"fingerprint": fingerprint}
  cached = distributed.on_process_zero(lambda: _read_cached(path))
  rows = cached[1:] if cached[:1] == [head] else []
  if len(rows) < count:  # An incomplete batch is computed again as a whole.
    rows = rows[: len(rows) // batch * batch]
    sealed = [head, *map(jsonl.seal_row, rows)]
    distributed.on_process_zero(lambda: jsonl.write_records(path, sealed))
  for start in range(len(rows), count, batch):
    added = make(range(start, min(start + batch, count)))
    sealed = list(map(jsonl.seal_row, added))
    distributed.on_process_zero(functools.partial(jsonl.append_jsonl, path, sealed))
    rows += added
    on_progress(len(rows))
  return rows


def _read_cached(path: pathlib.Path) -> list[Row]:
  """Returns the rows of a file before the first damaged line; [] without a file."""
  if not path.exists():
    return []
  rows, damaged = jsonl.read_intact_rows(path)
  if not damaged:
    return rows
  distributed.print_once(
    f"{jsonl.format_damage(path, damaged)}: computing the rows from it again"
  )
  return rows[: min(damaged) - 1]


def compute_fingerprint(variables: Params, *facts: object) -> str:
  """Hashes a model's variables and other values that results depend on.

  Args:
    variables: Arrays, hashed by name, shape, type and checksum.
    *facts: Values, hashed by their `repr`.
  """
  digest = hashlib.sha256(repr(facts).encode())
  leaves, _ = jax.tree.flatten_with_path(variables)
  for path, leaf in leaves:
    name = (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
    digest.update(repr((*name, int(compute_checksum(leaf)))).encode())
  return digest.hexdigest()[:16]


@jax.jit
def compute_checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  """Computes a checksum of an array on its own devices.

  An integer sum has no rounding, so the checksum is the same on every mesh.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
