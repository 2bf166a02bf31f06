"""A cache of rows on disk, so that a killed computation resumes where it stopped."""

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

Row: TypeAlias = dict[str, Any]


def load_or_compute(
  path: pathlib.Path,
  make: Callable[[range], list[Row]],
  *,
  count: int,
  batch: int,
  fingerprint: str,
  tell: Callable[[int], None] = lambda done: None,
) -> list[Row]:
  """`count` rows, of which those in the file are not made again.

  The file's first line holds the fingerprint of what the rows depend on: where that
  has changed, all are made anew.

  Args:
    path: a JSONL file, written by the first process alone.
    make: the rows of these numbers, at most `batch`; whole batches reach the file.
    count: rows in all.
    batch: rows that are made together.
    fingerprint: of everything that the rows depend on.
    tell: is given how many are done, after each batch.
  """
  head = {"fingerprint": fingerprint}
  found = distributed.on_process_zero(
    lambda: jsonl.read_jsonl(path) if path.exists() else []
  )
  rows = found[1:] if found[:1] == [head] else []
  if len(rows) < count:  # Of a batch that was cut short, none is kept.
    rows = rows[: len(rows) // batch * batch]
    distributed.on_process_zero(lambda: jsonl.write_records(path, [head, *rows]))
  for start in range(len(rows), count, batch):
    made = make(range(start, min(start + batch, count)))
    distributed.on_process_zero(functools.partial(jsonl.append_jsonl, path, made))
    rows += made
    tell(len(rows))
  return rows


def compute_fingerprint(variables: Params, *facts: object) -> str:
  """A name for what rows depend on: a model's variables, and facts that repr tells."""
  digest = hashlib.sha256(repr(facts).encode())
  leaves, _ = jax.tree.flatten_with_path(variables)
  for path, leaf in leaves:
    name = (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
    digest.update(repr((*name, int(compute_checksum(leaf)))).encode())
  return digest.hexdigest()[:16]


@jax.jit
def compute_checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  """A number that changes with an array's elements, made where the array is.

  A sum of integers has no rounding: it is the same on every mesh.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
