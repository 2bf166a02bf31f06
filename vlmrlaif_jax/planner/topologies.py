"""Slices of accelerators by their public names, as devices to compile for.

None of them needs to be there: libtpu and the CUDA plugin compile for what they are
told. Nothing here imports jax before it is asked for devices, since `environment` has
to be set before that.
"""

import glob
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

GIB = 2**30


class Host(NamedTuple):
  """What a CPU does with a program's own shapes; measured, see perf/calibrate.py."""

  flops: float  # A second, of products of the model's matrices.
  weights: float  # Bytes a second of those matrices, for a few tokens.
  handed: float  # Bytes a second of what stands between two products.
  fresh: float  # Seconds for each byte of memory that the system hands out.


class Chip(NamedTuple):
  """The most that one chip can do, by its maker's data sheet."""

  flops: float  # A second, in bfloat16 without sparsity.
  memory: float  # Bytes that a program may use, of one of its JAX devices.
  bandwidth: float  # Of that memory, bytes a second.
  # Bytes a second that it takes in from the others: TPUs over both links of one axis
  # of the torus, GPUs over NVLink in one direction.
  links: float
  latency: float  # Seconds of a collective that moves next to nothing; our estimate.
  cores: int = 1  # That the slice's public name counts, a chip.
  devices: int = 1  # JAX devices of a chip.
  outside: float = 0.0  # Bytes a second from other hosts, where that is less.
  host: Host | None = None  # Of a CPU.


# TPUs: cloud.google.com/tpu/docs/system-architecture and jax-ml.github.io/scaling-book;
# their memory is what libtpu says it has. GPUs: NVIDIA's data sheets.
CHIPS = {
  "v4": Chip(275e12, 30.75 * GIB, 1.228e12, 0.9e11, 2e-6, cores=2),
  "v5e": Chip(197e12, 15.75 * GIB, 0.819e12, 0.9e11, 2e-6),
  "v5p": Chip(459e12, 95.74 * GIB, 2.765e12, 1.8e11, 2e-6, cores=2),
  "v6e": Chip(918e12, 31.25 * GIB, 1.640e12, 1.8e11, 2e-6),
  "tpu7x": Chip(2307e12, 94.75 * GIB, 7.380e12, 1.8e11, 2e-6, cores=2, devices=2),
  "a100": Chip(312e12, 79.25 * GIB, 2.039e12, 3.0e11, 1e-5, outside=2.5e10),
  "h100": Chip(989e12, 79.10 * GIB, 3.350e12, 4.5e11, 1e-5, outside=5.0e10),
  "h200": Chip(989e12, 140.4 * GIB, 4.800e12, 4.5e11, 1e-5, outside=5.0e10),
}
GPUS = ("a100", "h100", "h200")
FLAT = ("v5e", "v6e")  # Tori of two axes; the others have three.
HOST_GPUS = 8
_SHAPES = {  # Chips of a slice -> its torus.
  2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
      256: "16x16"},
  3: {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4",
      128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"},
}  # fmt: skip
_TPU_ENVIRONMENT = {  # What libtpu would otherwise ask a server that is not there.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Or a second compilation at a time fails.
}

# Products of gathered weights stay whole: in windows (a "collective matmul") those of
# layers over 16 devices compile for minutes instead of eight seconds, in more memory.
_LIBTPU = ("--xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000")

_DRIVERS = (  # NVIDIA's, also under Windows; TPUs'; AMD's.
  *("/dev/nvidiactl", "/dev/dxg"),
  *("/dev/accel*", "/dev/vfio/[0-9]*"),
  "/dev/kfd",
)


class Topology(NamedTuple):
  """A slice of one kind of chip."""

  name: str  # Public: "v5p-8".
  kind: str  # A key of CHIPS, or "cpu".
  chips: int
  shape: str  # As the compiler takes it: "2x2x1".

  @property
  def platform(self) -> str:
    """Of JAX: "tpu", "cuda" or "cpu"."""
    if self.kind == "cpu":
      return "cpu"
    return "cuda" if self.kind in GPUS else "tpu"


def parse_topology(name: str) -> Topology:
  """The slice of a public name: v5e-16, v5p-8 (8 cores, 4 chips), h200-8, cpu-1.

  Raises:
    ValueError: there is none of that name.
  """
  kind, _, count = name.partition("-")
  if not re.fullmatch(r"[1-9]\d*", count) or kind not in (*CHIPS, "cpu"):
    raise ValueError(f"no topology {name!r}: {_known()}")
  chips = int(count)
  if kind == "cpu":
    return Topology(name, kind, chips, "")
  if kind in GPUS:
    hosts, odd = divmod(chips, HOST_GPUS)
    if chips > HOST_GPUS and odd:
      raise ValueError(
        f"{name}: more than {HOST_GPUS} GPUs are whole hosts of {HOST_GPUS}: {_known()}"
      )
    return Topology(name, kind, chips, f"1x{hosts or 1}x{min(chips, HOST_GPUS)}")
  chips, odd = divmod(chips, CHIPS[kind].cores)
  shapes = _SHAPES[2 if kind in FLAT else 3]
  if odd or chips not in shapes:
    raise ValueError(f"no topology {name!r}: {_known()}")
  return Topology(name, kind, chips, shapes[chips])


def _known() -> str:
  """The names that there are."""
  names = []
  for kind, chip in CHIPS.items():
    if kind in GPUS:
      names.append(f"{kind}-1 to {kind}-8, {kind}-16 and so on by hosts of 8")
    else:
      shapes = _SHAPES[2 if kind in FLAT else 3]
      names.append(f"{kind}-" + "|".join(str(n * chip.cores) for n in shapes))
  return "they are " + "; ".join(names) + "; and cpu-1, cpu-2, ... of this machine"


def has_accelerator() -> bool:
  """Whether this machine may have one; on a Linux without, plugins that are there to
  compile would only complain, unless JAX is told to use the CPU.
  """
  return sys.platform != "linux" or any(map(glob.glob, _DRIVERS))


def make_libtpu_arguments(environ: Mapping[str, str]) -> str:
  """What LIBTPU_INIT_ARGS is to hold before jax is imported: what it holds, and what we
  want of the compiler where that says nothing of it.
  """
  name, value = _LIBTPU
  given = environ.get("LIBTPU_INIT_ARGS", "")
  return given if name in given else f"{given} {name}={value}".strip()


def make_environment(topology: Topology) -> dict[str, str]:
  """What the environment is to hold before jax is imported."""
  # Compiles seven times faster; the peak of memory differs by some 5 %.
  always = {"JAX_PLATFORMS": "cpu", "JAX_OPTIMIZATION_LEVEL": "O0"}
  if topology.platform == "tpu":
    arguments = {"LIBTPU_INIT_ARGS": make_libtpu_arguments(os.environ)}
    return always | _TPU_ENVIRONMENT | arguments
  if topology.platform == "cuda":
    return always | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
  flags = f"--xla_force_host_platform_device_count={topology.chips}"
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def get_topology_devices(topology: Topology) -> list[Any]:
  """The slice's JAX devices, which compile and hold nothing.

  Raises:
    ImportError: what compiles for it is not installed.
  """
  import jax
  from jax.experimental import topologies

  if topology.platform == "cpu":
    return jax.devices("cpu")[: topology.chips]
  given: dict[str, Any] = {"topology_name": ""}
  if topology.platform == "cuda":
    given |= {"target_config": _gpu(topology.kind), "topology": topology.shape}
  else:
    given["topology_name"] = f"{topology.kind}:{topology.shape}"
    if topology.chips == 1:
      given["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
      given["chip_config_name"] = "megacore"  # Two cores are one device.
  try:
    made = topologies.get_topology_desc(platform=topology.platform, **given)
  except (NotImplementedError, RuntimeError) as error:
    extra = "plan-gpu" if topology.platform == "cuda" else "plan"
    raise ImportError(
      f"nothing here compiles for {topology.name} ({str(error).splitlines()[0]}): "
      f'pip install "vlmrlaif_jax[{extra}]", on Linux'
    ) from error
  return list(made.devices)


def _gpu(kind: str) -> str:
  """A GPU as XLA's GpuTargetConfigProto, in text."""
  folder = pathlib.Path(__file__).parents[1] / "assets" / "gpus"
  return (folder / f"{kind}.txtpb").read_text()


def factorize(count: int, axes: int) -> list[tuple[int, ...]]:
  """All ways to write `count` as a product of so many sizes."""
  if axes == 1:
    return [(count,)]
  return [
    (size, *rest)
    for size in range(1, count + 1)
    if count % size == 0
    for rest in factorize(count // size, axes - 1)
  ]
