"""Slices of accelerators by their public names, as devices to compile for.

The devices need not exist: libtpu and the CUDA plugin compile for a description. Call
`make_environment` before jax is imported; this module imports jax only for devices.
"""

import glob
import importlib
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

GIB = 2**30


class Host(NamedTuple):
  """Measured speed of a CPU on a program's own shapes; see perf/calibrate.py."""

  flops: float  # FLOPs per second of matmuls of the model's shapes.
  weight_bandwidth: float  # Bytes per second of weights, in decoding.
  activation_bandwidth: float  # Bytes per second of activations between matmuls.
  allocation_seconds: float  # Seconds to allocate a byte.


class Chip(NamedTuple):
  """The limits of one chip, from its data sheet."""

  flops: float  # FLOPs per second, in bfloat16 without sparsity.
  memory: float  # Bytes that a program may use on one of its JAX devices.
  bandwidth: float  # Bytes per second of that memory.
  # Bytes per second received from other chips: TPUs over both links of one axis of the
  # torus, GPUs over NVLink in one direction.
  links: float
  latency: float  # Seconds of a collective that moves few bytes; an estimate.
  cores: int = 1  # Units per chip that the slice's public name counts.
  devices: int = 1  # JAX devices per chip.
  outside: float = 0.0  # Bytes per second from other hosts; 0 if as fast as `links`.
  host: Host | None = None  # Measured limits of a CPU; None for accelerators.


# TPUs: cloud.google.com/tpu/docs/system-architecture and jax-ml.github.io/scaling-book;
# libtpu reports their memory. GPUs: NVIDIA's data sheets.
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
FLAT = ("v5e", "v6e")  # Their torus has two axes; the others' have three.
HOST_GPUS = 8
_SHAPES = {  # Chips of a slice -> its torus.
  2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
      256: "16x16"},
  3: {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4",
      128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"},
}  # fmt: skip
_TPU_ENVIRONMENT = {  # Otherwise libtpu requests these from a metadata server.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Allows concurrent compilations.
}

# Without this flag, matmuls of gathered weights become windowed einsums: layers over 16
# devices then compile for minutes instead of eight seconds, and need more memory.
_LIBTPU = ("--xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000")

_DRIVERS = (  # Devices of NVIDIA, also under Windows, of TPUs and of AMD.
  *("/dev/nvidiactl", "/dev/dxg"),
  *("/dev/accel*", "/dev/vfio/[0-9]*"),
  "/dev/kfd",
)


class Topology(NamedTuple):
  """A slice of chips of one kind."""

  name: str  # Public name: "v5p-8".
  kind: str  # Key of CHIPS, or "cpu".
  chips: int
  shape: str  # Shape for the compiler: "2x2x1".

  @property
  def platform(self) -> str:
    """JAX platform: "tpu", "cuda" or "cpu"."""
    if self.kind == "cpu":
      return "cpu"
    return "cuda" if self.kind in GPUS else "tpu"


# The CUDA plugin, which is installed to compile for GPUs, logs these lines on a machine
# without one, before its log level can be set.
_NOISE = re.compile(
  rb"Could not find cuda drivers|before absl::InitializeLog\(\) is called"
)


def parse_topology(name: str) -> Topology:
  """Parses the public name of a slice.

  Args:
    name: v5e-16 (chips), v5p-8 (8 cores on 4 chips), h200-8 or cpu-1, for example.

  Raises:
    ValueError: No slice has this name.
  """
  kind, _, count = name.partition("-")
  if not re.fullmatch(r"[1-9]\d*", count) or kind not in (*CHIPS, "cpu"):
    raise ValueError(f"unknown topology {name!r}. {_list_names()}")
  chips = int(count)
  if kind == "cpu":
    return Topology(name, kind, chips, "")
  if kind in GPUS:
    hosts, odd = divmod(chips, HOST_GPUS)
    if chips > HOST_GPUS and odd:
      raise ValueError(
        f"{name}: GPUs must fill whole hosts of {HOST_GPUS}. {_list_names()}"
      )
    return Topology(name, kind, chips, f"1x{hosts or 1}x{min(chips, HOST_GPUS)}")
  chips, odd = divmod(chips, CHIPS[kind].cores)
  shapes = _SHAPES[2 if kind in FLAT else 3]
  if odd or chips not in shapes:
    raise ValueError(f"unknown topology {name!r}. {_list_names()}")
  return Topology(name, kind, chips, shapes[chips])


def _list_names() -> str:
  """Returns a sentence with all names."""
  names = []
  for kind, chip in CHIPS.items():
    if kind in GPUS:
      names.append(f"{kind}-1 to {kind}-8, {kind}-16, {kind}-24, ...")
    else:
      shapes = _SHAPES[2 if kind in FLAT else 3]
      names.append(f"{kind}-" + "|".join(str(n * chip.cores) for n in shapes))
  return "Set one of " + "; ".join(names) + "; or cpu-1, cpu-2, ... for this machine"


def has_accelerator() -> bool:
  """Returns whether this machine may have an accelerator.

  On Linux without one, JAX should use the CPU: compilers' plugins would log errors.
  """
  return sys.platform != "linux" or any(map(glob.glob, _DRIVERS))


def _open_buffer() -> BinaryIO:
  """Opens a file of no folder, because none may be writable but the workdir."""
  if sys.platform == "linux":
    return os.fdopen(os.memfd_create("stderr"), "w+b")
  return tempfile.TemporaryFile()


@contextmanager
def drop_plugin_noise() -> Iterator[None]:
  """Holds back stderr during the block, then writes it without the plugin's lines."""
  sys.stderr.flush()
  terminal = os.dup(2)
  with _open_buffer() as buffer:
    os.dup2(buffer.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(terminal, 2)
      os.close(terminal)
      buffer.seek(0)
      for line in buffer:
        if not _NOISE.search(line):
          os.write(2, line)


def import_jax() -> None:
  """Imports jax, which reads the environment, without the plugin's log lines."""
  with drop_plugin_noise():
    importlib.import_module("jax")


def init_backend() -> None:
  """Initializes JAX's backend without the plugin's log lines.

  With several processes, call it after they are connected.
  """
  import jax

  with drop_plugin_noise():
    jax.devices()


def make_libtpu_arguments(environ: Mapping[str, str]) -> str:
  """Returns LIBTPU_INIT_ARGS with the compiler flag that plans require.

  Args:
    environ: The environment; a value for the flag in it takes precedence.
  """
  name, value = _LIBTPU
  arguments = environ.get("LIBTPU_INIT_ARGS", "")
  return arguments if name in arguments else f"{arguments} {name}={value}".strip()


def make_environment(topology: Topology) -> dict[str, str]:
  """Returns the variables to set before jax is imported, to plan for a slice."""
  # O0 compiles seven times faster; the peak memory differs by about 5 %.
  always = {"JAX_PLATFORMS": "cpu", "JAX_OPTIMIZATION_LEVEL": "O0"}
  if topology.platform == "tpu":
    arguments = {"LIBTPU_INIT_ARGS": make_libtpu_arguments(os.environ)}
    return always | _TPU_ENVIRONMENT | arguments
  if topology.platform == "cuda":
    return always | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
  flags = f"--xla_force_host_platform_device_count={topology.chips}"
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def get_topology_devices(topology: Topology) -> list[Any]:
  """Returns the slice's JAX devices, which can compile and hold no arrays.

  Raises:
    ImportError: The compiler for the slice is not installed.
  """
  import jax
  from jax.experimental import topologies

  if topology.platform == "cpu":
    return jax.devices("cpu")[: topology.chips]
  options: dict[str, Any] = {"topology_name": ""}
  if topology.platform == "cuda":
    options |= {"target_config": _read_gpu(topology.kind), "topology": topology.shape}
  else:
    options["topology_name"] = f"{topology.kind}:{topology.shape}"
    if topology.chips == 1:
      options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":
      options["chip_config_name"] = "megacore"  # Two cores are one device.
  try:
    with drop_plugin_noise():
      slice_ = topologies.get_topology_desc(platform=topology.platform, **options)
  except (NotImplementedError, RuntimeError) as error:
    extra = "plan-gpu" if topology.platform == "cuda" else "plan"
    raise ImportError(
      f"no compiler for {topology.name} ({str(error).splitlines()[0]}). On Linux, run "
      f'pip install "vlmrlaif_jax[{extra}]"'
    ) from error
  return list(slice_.devices)


def _read_gpu(kind: str) -> str:
  """Returns a GPU's GpuTargetConfigProto of XLA, as text."""
  folder = pathlib.Path(__file__).parents[1] / "assets" / "gpus"
  return (folder / f"{kind}.txtpb").read_text()


def factorize(count: int, axes: int) -> list[tuple[int, ...]]:
  """Lists the ways to write `count` as a product of a number of factors."""
  if axes == 1:
    return [(count,)]
  return [
    (size, *rest)
    for size in range(1, count + 1)
    if count % size == 0
    for rest in factorize(count // size, axes - 1)
  ]
