"""Rows kept on disk: none is made twice, none is kept that is out of date."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlmrlaif_jax.core import jsonl, resumable


class Maker:
  """Makes rows and remembers which; dies after so many batches."""

  def __init__(self, batches=100):
    self.batches, self.made = batches, []

  def __call__(self, block):
    if not self.batches:
      raise KeyboardInterrupt
    self.batches -= 1
    self.made += block
    return [{"row": i} for i in block]


def kept(path, make, *, count=10, fingerprint="a"):
  return resumable.load_or_compute(
    path, make, count=count, batch=4, fingerprint=fingerprint
  )


def test_killed_run_goes_on_after_its_last_batch(tmp_path):
  whole, cut, after = Maker(), Maker(batches=2), Maker()
  rows = kept(tmp_path / "whole.jsonl", whole)
  with pytest.raises(KeyboardInterrupt):
    kept(tmp_path / "cut.jsonl", cut)
  assert kept(tmp_path / "cut.jsonl", after) == rows
  assert (cut.made, after.made) == (list(range(8)), [8, 9])
  texts = [(tmp_path / name).read_bytes() for name in ("whole.jsonl", "cut.jsonl")]
  assert texts[0] == texts[1]


@pytest.mark.parametrize("cut", [2, 20, 45, 70, 130])
def test_torn_file_is_mended(tmp_path, cut):
  path = tmp_path / "rows.jsonl"
  rows = kept(path, Maker())
  whole = path.read_bytes()
  path.write_bytes(whole[:-cut])
  assert kept(path, Maker()) == rows
  assert path.read_bytes() == whole


def test_finished_file_is_only_read(tmp_path):
  kept(tmp_path / "rows.jsonl", Maker())
  before = (tmp_path / "rows.jsonl").stat().st_mtime_ns
  assert kept(tmp_path / "rows.jsonl", Maker(0)) == [{"row": i} for i in range(10)]
  assert (tmp_path / "rows.jsonl").stat().st_mtime_ns == before


def test_rows_of_another_fingerprint_are_made_anew(tmp_path):
  kept(tmp_path / "rows.jsonl", Maker())
  make = Maker()
  kept(tmp_path / "rows.jsonl", make, fingerprint="b")
  assert make.made == list(range(10))
  assert jsonl.read_jsonl(tmp_path / "rows.jsonl")[0] == {"fingerprint": "b"}


WEIGHTS = {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones(3, jnp.bfloat16)}


def changed(name, at, value):
  return WEIGHTS | {name: WEIGHTS[name].at[at].set(value)}


@pytest.mark.parametrize(
  "other",
  [
    changed("a", (2, 3), 15.000001),
    changed("b", 2, 1.01),
    WEIGHTS | {"a": WEIGHTS["a"][::-1]},
    WEIGHTS | {"a": WEIGHTS["a"].reshape(6, 4)},
    {"a": WEIGHTS["a"], "c": WEIGHTS["b"]},
  ],
)
def test_fingerprint_changes_with_the_weights(other):
  assert resumable.compute_fingerprint(other) != resumable.compute_fingerprint(WEIGHTS)


def test_fingerprint_changes_with_the_facts():
  first, second, again = (
    resumable.compute_fingerprint(WEIGHTS, x) for x in ("x", "y", "x")
  )
  assert first == again != second


def test_fingerprint_is_the_same_on_every_mesh():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  spread = jax.device_put(WEIGHTS["a"], NamedSharding(mesh, PartitionSpec("data")))
  assert len(spread.sharding.device_set) == 4
  assert resumable.compute_fingerprint(
    WEIGHTS | {"a": spread}
  ) == resumable.compute_fingerprint(WEIGHTS)


def test_checksum_is_the_sum_it_says():
  x = np.array([[1.5, -2.0], [0.0, 3.25]], np.float32)
  bits = x.view(np.uint32).ravel().astype(object)
  expected = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
  assert int(resumable.compute_checksum(x)) == expected
