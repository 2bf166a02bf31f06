import pytest

from vlmrlaif_jax.planner import topologies


@pytest.mark.parametrize(
  "name, chips, shape",
  [
    ("v5e-16", 16, "4x4"),
    ("v5p-8", 4, "2x2x1"),  # Its name counts cores, two of a chip.
    ("v4-8", 4, "2x2x1"),
    ("v6e-256", 256, "16x16"),
    ("tpu7x-16", 8, "2x2x2"),
    ("h200-8", 8, "1x1x8"),
    ("a100-16", 16, "1x2x8"),
    ("cpu-2", 2, ""),
  ],
)
def test_public_names_are_read_as_their_makers_mean_them(name, chips, shape):
  found = topologies.parse_topology(name)
  assert (found.chips, found.shape) == (chips, shape)


@pytest.mark.parametrize(
  "name", ["v5e-12", "v5p-9", "b300-8", "v5e", "h200-0", "cpu-x"]
)
def test_an_unknown_name_is_refused_with_those_that_are_known(name):
  with pytest.raises(ValueError, match="v5e-1|4|8|16") as caught:
    topologies.parse_topology(name)
  assert name in str(caught.value) and "h200-8" in str(caught.value)


def test_gpus_beyond_a_host_are_whole_hosts():
  with pytest.raises(ValueError, match="whole hosts of 8"):
    topologies.parse_topology("h200-12")


def test_every_kind_has_a_slice_and_a_chip():
  for kind in topologies.CHIPS:
    found = topologies.parse_topology(f"{kind}-8")
    assert found.chips in (4, 8)
    assert topologies.CHIPS[found.kind].flops > 1e14


def test_a_gpu_is_described_in_protocol_buffers_text():
  text = " ".join(topologies._read_gpu("h200").split())
  assert 'name: "NVIDIA H200' in text
  assert "cuda_compute_capability { major: 9 feature_extension: " in text
  assert "device_memory_size: 151397597184" in text


def test_all_ways_to_share_devices_out():
  assert topologies.factorize(4, 2) == [(1, 4), (2, 2), (4, 1)]
  assert len(topologies.factorize(16, 3)) == 15


@pytest.mark.parametrize("given", ["", "--xla_enable_something=true"])
def test_what_is_set_for_libtpu_stands_beside_what_was_given(given):
  whole = topologies.make_libtpu_arguments({"LIBTPU_INIT_ARGS": given})
  assert whole.startswith(given) and "windowed_einsum_mib=1000000" in whole


def test_what_libtpu_was_told_is_left_so():
  given = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=256"
  assert topologies.make_libtpu_arguments({"LIBTPU_INIT_ARGS": given}) == given
