"""Tables of names: what is stacked and turned, what is refused, and where it goes."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.huggingface import param_mapping
from vlmrlaif_jax.huggingface.tensor_files import Tensor

TABLE = {
  "a/kernel": ("layers.{}.weight", "T"),
  "patch": ("conv.weight", "conv"),
  "frames": ("conv3d.weight", "conv3d"),
  "scale": ("scale", ""),
}
TENSORS = {
  "layers.0.weight": np.arange(6.0).reshape(2, 3),
  "layers.1.weight": np.arange(6.0, 12.0).reshape(2, 3),
  "conv.weight": np.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2),
  "conv3d.weight": np.arange(2 * 3 * 2 * 2 * 2.0).reshape(2, 3, 2, 2, 2),
  "scale": np.array(7.0),
}
SHAPES = {
  "a": {"kernel": jax.ShapeDtypeStruct((2, 3, 2), np.float32)},
  "patch": jax.ShapeDtypeStruct((12, 2), np.float32),
  "frames": jax.ShapeDtypeStruct((24, 2), np.float32),
  "scale": jax.ShapeDtypeStruct((), np.float32),
}


def test_from_hf_stacks_transposes_and_flattens():
  params = param_mapping.convert_from_hf(TABLE, TENSORS, SHAPES)
  np.testing.assert_array_equal(params["a"]["kernel"][1], [[6, 9], [7, 10], [8, 11]])
  # Height, then width, then colour; of the first filter.
  want = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
  np.testing.assert_array_equal(params["patch"][:, 0], want)
  # Colour, then frame, height and width.
  np.testing.assert_array_equal(params["frames"][:, 1], np.arange(24, 48))


def test_to_hf_is_the_inverse_of_from_hf():
  tensors = dict(
    param_mapping.convert_to_hf(
      TABLE, param_mapping.convert_from_hf(TABLE, TENSORS, SHAPES)
    )
  )
  assert set(tensors) == set(TENSORS)
  for name, x in TENSORS.items():
    np.testing.assert_array_equal(tensors[name], x)


def test_from_hf_names_what_is_missing_and_what_is_unused():
  tensors = {**TENSORS, "stray": np.zeros(2)}
  del tensors["layers.1.weight"]
  with pytest.raises(ValueError, match=r"missing.*layers\.1\.weight.*unused.*stray"):
    param_mapping.convert_from_hf(TABLE, tensors, SHAPES)


def test_from_hf_names_a_wrong_shape():
  tensors = {**TENSORS, "scale": np.zeros(2)}
  with pytest.raises(ValueError, match=r"scale must have shape \(\), got \(2,\)"):
    param_mapping.convert_from_hf(TABLE, tensors, SHAPES)


def test_parameters_that_the_table_does_not_know_are_refused():
  with pytest.raises(ValueError, match=r"without a name.*\['head/bias'\]"):
    param_mapping.convert_from_hf(
      TABLE, TENSORS, {**SHAPES, "head": {"bias": SHAPES["scale"]}}
    )
  with pytest.raises(ValueError, match=r"without a name.*\['head/bias'\]"):
    dict(param_mapping.convert_to_hf(TABLE, {"head": {"bias": np.zeros(1)}}))


# Into shards.

SPEC = (None, None, "fsdp")


def recorded(reads, tensors=TENSORS):
  """Tensors each of whose reads is written down: name and bytes."""

  def tensor(name, x):
    def read(index):
      reads.append((name, x[index].nbytes))
      return np.asarray(x[index])

    return Tensor(x.shape, x.dtype, read)

  return {name: tensor(name, x) for name, x in tensors.items()}


def places():
  """Of the parameters of TABLE, split in two."""
  mesh = sharding.make_mesh(data=2, fsdp=2)
  at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  return {
    "a": {"kernel": at(*SPEC)},
    "patch": at(None, "fsdp"),
    "frames": at(None, "fsdp"),
    "scale": at(),
  }


def test_placed_parameters_equal_those_on_the_host():
  host = param_mapping.convert_from_hf(TABLE, TENSORS, SHAPES)
  placed = param_mapping.convert_from_hf(TABLE, TENSORS, SHAPES, places())
  jax.tree.map(np.testing.assert_array_equal, placed, host)


def test_parameters_are_where_their_sharding_says():
  at = places()
  placed = param_mapping.convert_from_hf(TABLE, TENSORS, SHAPES, at)
  same = lambda x, want: x.sharding.is_equivalent_to(want, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, placed, at)))


def test_each_device_is_read_its_part_only():
  reads = []
  param_mapping.convert_from_hf(TABLE, recorded(reads), SHAPES, places())
  kernel = [size for name, size in reads if name.startswith("layers")]
  assert max(kernel) == TENSORS["layers.0.weight"].nbytes // 2


def test_nothing_is_read_of_what_does_not_fit():
  reads = []
  wrong = {**SHAPES, "scale": jax.ShapeDtypeStruct((3,), np.float32)}
  with pytest.raises(ValueError, match="scale must have shape"):
    param_mapping.convert_from_hf(TABLE, recorded(reads), wrong, places())
  assert reads == []


def test_bytes_that_came_are_told():
  counts = []
  param_mapping.convert_from_hf(TABLE, TENSORS, SHAPES, on_bytes_read=counts.append)
  assert sum(counts) == sum(x.nbytes for x in TENSORS.values())


# In pieces.

LONG = {
  "embed": np.arange(28.0).reshape(14, 2),
  "layers.0": np.arange(28.0).reshape(14, 2),
  "layers.1": np.arange(28.0, 56.0).reshape(14, 2),
  "conv": np.arange(14 * 12.0).reshape(14, 3, 2, 2),
}
LONG_TABLE = {
  "embed": ("embed", ""),
  "kernel": ("layers.{}", "T"),
  "conv": ("conv", "conv"),
}
LONG_SHAPES = {
  "embed": jax.ShapeDtypeStruct((14, 2), "bfloat16"),
  "kernel": jax.ShapeDtypeStruct((2, 2, 14), "bfloat16"),
  "conv": jax.ShapeDtypeStruct((12, 14), "bfloat16"),
}


def long_places(**specs):
  mesh = sharding.make_mesh(data=2, fsdp=2)
  return {name: NamedSharding(mesh, PartitionSpec(*x)) for name, x in specs.items()}


ROWS = dict(embed=("fsdp", None), kernel=(None, None, "fsdp"), conv=(None, "fsdp"))
COLUMNS = dict(embed=(None, "fsdp"), kernel=(None, "fsdp"), conv=("fsdp",))
BOTH = dict(
  embed=("data", "fsdp"), kernel=(None, "fsdp", "data"), conv=("fsdp", "data")
)


@pytest.fixture(params=["on the host", "on the devices"])
def where(request, monkeypatch):
  """Converts on the host, as on CPUs, or in the programs of accelerators."""
  if request.param == "on the devices":
    monkeypatch.setattr(param_mapping, "_HOST_PLATFORMS", ())


@pytest.mark.parametrize("specs", [None, {}, ROWS, COLUMNS, BOTH])
@pytest.mark.usefixtures("where")
def test_tensors_are_whole_when_read_in_pieces(monkeypatch, specs):
  # Of 7 rows of a shard, or 14 of a tensor, a few: the last pieces overlap.
  monkeypatch.setattr(param_mapping, "_CHUNK_BYTES", 144)
  at = None
  if specs is not None:
    at = long_places(**(specs or dict.fromkeys(LONG_TABLE, ())))
  params = param_mapping.convert_from_hf(LONG_TABLE, LONG, LONG_SHAPES, at)
  want = {
    "embed": LONG["embed"],
    "kernel": np.stack([LONG["layers.0"].T, LONG["layers.1"].T]),
    "conv": LONG["conv"].transpose(2, 3, 1, 0).reshape(12, 14),
  }
  for name, x in want.items():
    np.testing.assert_array_equal(np.asarray(params[name], np.float32), x)
    assert at is None or params[name].sharding.is_equivalent_to(at[name], x.ndim)


@pytest.mark.parametrize("platforms, limit", [(("cpu",), 400), ((), 400 // 4)])
def test_no_more_than_a_piece_is_read_at_once(monkeypatch, platforms, limit):
  """A host reads for one device after another, or for 4 in one step."""
  monkeypatch.setattr(param_mapping, "_CHUNK_BYTES", 400)
  monkeypatch.setattr(param_mapping, "_HOST_PLATFORMS", platforms)
  reads = []
  tensors = recorded(reads, LONG)
  param_mapping.convert_from_hf(LONG_TABLE, tensors, LONG_SHAPES, long_places(**ROWS))
  sizes = [size for name, size in reads if name != "embed"]  # Smaller than a piece.
  assert limit / 2 < max(sizes) <= limit


def test_piece_is_written_where_it_belongs_without_a_copy_of_the_rest():
  place = long_places(x=(None, None, "fsdp"))["x"]
  layer = NamedSharding(place.mesh, PartitionSpec(None, "fsdp"))
  rows = NamedSharding(place.mesh, PartitionSpec("fsdp"))
  # In float32: XLA's CPU compiler converts whole arrays of bfloat16.
  shape = lambda dims, at: jax.ShapeDtypeStruct(dims, "float32", sharding=at)
  out, piece = shape((4, 64, 1024), place), shape((16, 64), rows)
  lowered = param_mapping._write_rows.lower(out, piece, 1, 8, "T", place, layer)
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes <= 64 * 16 * 4
  assert memory.alias_size_in_bytes == 4 * 64 * 1024 // 2 * 4


def test_shards_on_a_cpu_are_the_arrays_of_the_host(monkeypatch):
  made = []
  allocate = param_mapping.allocate_aligned
  keep = lambda *args: made.append(allocate(*args)) or made[-1]
  monkeypatch.setattr(param_mapping, "allocate_aligned", keep)
  params = param_mapping.convert_from_hf(
    LONG_TABLE, LONG, LONG_SHAPES, long_places(**ROWS)
  )
  shards = [s.data for x in params.values() for s in x.addressable_shards]
  found = {x.unsafe_buffer_pointer() for x in shards}
  assert found == {x.ctypes.data for x in made}


def test_sharding_that_splits_layers_is_refused():
  at = long_places(**{**ROWS, "kernel": ("fsdp",)})
  with pytest.raises(ValueError, match="splits the layers"):
    param_mapping.convert_from_hf(LONG_TABLE, LONG, LONG_SHAPES, at)


# Packed.


def halves(layer):
  """What rounds a layer to two others, of other shapes and dtypes."""
  return {"codes": layer.astype("int8"), "scale": layer[0] / 2}


def test_packed_parameter_is_made_of_its_layers_where_its_shardings_say():
  at = places()
  mesh = at["scale"].mesh
  leaves = {
    "codes": NamedSharding(mesh, PartitionSpec(*SPEC)),
    "scale": NamedSharding(mesh, PartitionSpec(None, "fsdp")),
  }
  packed = {"a/kernel": param_mapping.PackedKernel(halves, leaves)}
  params = param_mapping.convert_from_hf(TABLE, TENSORS, SHAPES, at, packed=packed)
  assert set(params["a"]) == {"codes", "scale"}
  assert params["a"]["codes"].dtype == np.int8
  np.testing.assert_array_equal(params["a"]["codes"][1], [[6, 9], [7, 10], [8, 11]])
  np.testing.assert_array_equal(params["a"]["scale"], [[0, 1.5], [3, 4.5]])
  for leaf, place in leaves.items():
    x = params["a"][leaf]
    assert x.sharding.is_equivalent_to(place, x.ndim)
