"""Compiles a stage's functions for devices of another machine, with a cache on disk."""

import functools
import hashlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jaxlib
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.files import read_json, write_json
from vlmrlaif_jax.planner import collectives as collectives_lib
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import DeviceFunction

_NEEDED_MEMORY = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM")
# Autotuning tiles requires a GPU; cuBLAS needs no tuning.
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompiledProgram(NamedTuple):
  """A compiled program's memory and collectives; bytes are per device."""

  name: str
  peak: float  # Peak of live bytes, arguments included.
  arguments: float  # Bytes of the arguments.
  outputs: list[list[Any]]  # Partition of each output.
  collectives: list[collectives_lib.Collective]
  seconds: float  # Duration of the compilation.
  refused: str = ""  # Error of a compiler that ran out of device memory.
  placed_args: tuple[jax.ShapeDtypeStruct, ...] = ()  # Arguments with a sharding.

  @property
  def allocated_bytes(self) -> float:
    """Bytes that each call allocates: all but the arguments."""
    return float(self.peak - self.arguments)


def compile_all(
  run: Run,
  function: DeviceFunction,
  cache: pathlib.Path,
  note: Callable[[str], None],
) -> list[CompiledProgram]:
  """Compiles each jitted function of a device function, in order.

  Args:
    run: A run of shapes.
    function: The function; it is jitted or calls jitted functions in sequence.
    cache: Folder of compiled programs' results.
    note: Receives a line of progress.

  Raises:
    ImportError: cuDNN is required and not installed.
  """
  try:
    # Attention over several devices reads the mesh from this context.
    with jax.set_mesh(run.mesh):
      passes = [p for each in function.passes.values() for p in each]
      # Decoding loops, by their greatest number of iterations.
      loops = {p.new: p.phase for p in passes if p.phase == "decode"}
      compile_one = functools.partial(compile_program, run, loops, cache, note)
      if isinstance(function.call, jax.stages.Wrapped):
        return [compile_one(function.name, function.call, function.args())]
      return list(_compile_called_functions(run, function, compile_one))
  except RuntimeError as error:
    if "cuDNN not found" not in str(error):
      raise
    raise ImportError(
      "--config.model.attention=cudnn is compiled with cuDNN, which is not installed. "
      'Run pip install "vlmrlaif_jax[plan-gpu]", or set --config.model.attention=xla'
    ) from error


def _compile_called_functions(
  run, function, compile_one: Callable[..., CompiledProgram]
) -> Iterator[CompiledProgram]:
  """Compiles the jitted functions that a Python function calls.

  The outputs of each are arguments of the next.
  """
  args = function.args()
  traced = jax.make_jaxpr(function.call)(*args)
  known: dict[Any, Any] = dict(
    zip(traced.jaxpr.invars, jax.tree.leaves(args), strict=True)
  )
  known |= {
    var: jax.ShapeDtypeStruct(value.shape, value.dtype)
    for var, value in zip(traced.jaxpr.constvars, traced.consts, strict=True)
  }
  for equation in traced.eqns:
    inner = equation.params.get("jaxpr")
    if equation.primitive.name not in ("jit", "pjit"):
      known |= {var: _make_host_shape(run, var.aval) for var in equation.outvars}
      continue
    is_var = lambda x: isinstance(x, jax.extend.core.Var)
    inputs = tuple(known[x] if is_var(x) else x.val for x in equation.invars)
    program = compile_one(equation.params["name"], jax.jit(jaxpr_as_fun(inner)), inputs)
    yield program
    for var, spec in zip(equation.outvars, program.outputs, strict=True):
      at = NamedSharding(run.mesh, _make_spec(spec))
      known[var] = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype, sharding=at)


def _make_host_shape(run, aval) -> jax.ShapeDtypeStruct:
  """Returns the shape of an array from the host, sharded by rows where possible."""
  at = NamedSharding(run.mesh, _make_spec(_get_row_spec(run, aval)))
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=at)


def compile_program(
  run: Run,
  loops: dict[int, str],
  cache: pathlib.Path,
  note: Callable[[str], None],
  name: str,
  call: jax.stages.Wrapped,
  args: tuple[Any, ...],
) -> CompiledProgram:
  """Compiles a jitted function for its arguments, or reads its cached result.

  Args:
    run: A run of shapes.
    loops: Names of decoding loops by their greatest number of iterations.
    cache: Folder of compiled programs' results.
    note: Receives a line of progress.
    name: Name of the function.
    call: The jitted function.
    args: Its arguments, as shapes.
  """
  start = time.monotonic()
  lowered = call.lower(*args)
  path = cache / f"{_hash_program(lowered, run, loops)}.json"
  if not path.exists():
    note(f"  {name}: compiling")
    program = _compile(lowered, name, run, loops)
    program = program._replace(seconds=round(time.monotonic() - start, 1))
    cache.mkdir(parents=True, exist_ok=True)
    fields = program._asdict()
    del fields["placed_args"]
    write_json(path, fields)
  cached = read_json(path)
  collectives = cached.pop("collectives")
  collectives = [collectives_lib.Collective(*each) for each in collectives]
  # Scalars and ids without a sharding are small enough to ignore.
  placed = [
    x
    for x in jax.tree.leaves(args)
    if isinstance(x, jax.ShapeDtypeStruct) and x.sharding
  ]
  return CompiledProgram(**cached, collectives=collectives, placed_args=tuple(placed))


def _hash_program(lowered, run, loops) -> str:
  """Returns a hash of a program, its devices and the compiler."""
  devices = run.mesh.devices
  one = devices.flat[0]
  identity = (
    lowered.as_text(),
    str(run.mesh.shape),
    one.device_kind,
    one.platform,
    [str(device) for device in devices.flat],
    (jax.__version__, jaxlib.__version__, one.client.platform_version),
    [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    collectives_lib.CACHE_VERSION,
    sorted(loops),
  )
  return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _compile(lowered, name: str, run, loops) -> CompiledProgram:
  outputs = jax.tree.leaves(lowered.out_info)
  platform = run.mesh.devices.flat[0].platform
  try:
    done = lowered.compile(compiler_options=_OPTIONS.get(platform))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed = _NEEDED_MEMORY.search(str(error))
    size = float(needed[1]) * _UNITS[needed[2]] if needed else float("inf")
    refused = str(error).splitlines()[0]
    rows = [_get_row_spec(run, x) for x in outputs]
    return CompiledProgram(name, size, 0, rows, [], 0.0, refused)
  memory = done.memory_analysis()
  peak = memory.peak_memory_in_bytes
  if platform == "cpu":  # Its peak excludes temporaries, so all bytes are added up.
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  text, size = done.as_text(), run.mesh.devices.size
  return CompiledProgram(
    name,
    peak,
    memory.argument_size_in_bytes,
    [list(x.spec) for x in jax.tree.leaves(done.output_shardings)],
    collectives_lib.find_collectives(text, size, loops),
    0.0,
  )


def _get_row_spec(run, x) -> list[Any]:
  if x.shape and x.shape[0] % sharding.num_batch_shards(run.mesh) == 0:
    return [["data", "fsdp"]]
  return []


def _make_spec(names: list[Any]) -> P:
  return P(*(tuple(each) if isinstance(each, list) else each for each in names))
