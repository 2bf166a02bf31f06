"""Functions compiled for devices that are not there, and what came of it, kept."""

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

_TOO_MUCH = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM")
# Without a GPU no sizes of tiles can be tried out; cuBLAS needs none.
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompiledProgram(NamedTuple):
  """What the compiler says of a program; bytes are per device."""

  name: str
  peak: float  # Live at once, arguments included.
  arguments: float
  outputs: list[list[Any]]  # The partition of each output.
  collectives: list[collectives_lib.Collective]
  seconds: float  # That it took to compile.
  refused: str = ""  # Why it could not be compiled.
  given: tuple[jax.ShapeDtypeStruct, ...] = ()  # Arguments that lie on the mesh.

  @property
  def fresh(self) -> float:
    """Bytes that a CPU gives it for every run: all but what it is handed."""
    return float(self.peak - self.arguments)


def compile_all(
  run: Run,
  function: DeviceFunction,
  cache: pathlib.Path,
  note: Callable[[str], None],
) -> list[CompiledProgram]:
  """All that is jitted in a function, in order; what one returns is given to the next.

  Args:
    cache: the folder of what has been compiled before, by its program.
    note: takes a line that tells how far it is.

  Raises:
    ImportError: cuDNN is asked for, and not installed.
  """
  try:
    # Attention over several devices finds the mesh there; nothing may run under it.
    with jax.set_mesh(run.mesh):
      passes = [p for each in function.passes.values() for p in each]
      # Loops that decode, by how often they run.
      loops = {p.new: p.phase for p in passes if p.phase == "decode"}
      ask = functools.partial(compile_program, run, loops, cache, note)
      if isinstance(function.call, jax.stages.Wrapped):  # Not one of several.
        return [ask(function.name, function.call, function.args())]
      return list(_collected(run, function, ask))
  except RuntimeError as error:
    if "cuDNN not found" not in str(error):
      raise
    raise ImportError(
      "model.attention=cudnn is compiled with cuDNN, which is not installed: "
      'pip install "vlmrlaif_jax[plan-gpu]", or take --config.model.attention=xla'
    ) from error


def _collected(
  run, function, ask: Callable[..., CompiledProgram]
) -> Iterator[CompiledProgram]:
  """Of a collect that is no jitted function, but calls some."""
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
      known |= {var: _plain(run, var.aval) for var in equation.outvars}
      continue
    is_var = lambda x: isinstance(x, jax.extend.core.Var)
    given = tuple(known[x] if is_var(x) else x.val for x in equation.invars)
    made = ask(equation.params["name"], jax.jit(jaxpr_as_fun(inner)), given)
    yield made
    for var, spec in zip(equation.outvars, made.outputs, strict=True):
      at = NamedSharding(run.mesh, _spec(spec))
      known[var] = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype, sharding=at)


def _plain(run, aval) -> jax.ShapeDtypeStruct:
  """Of what the host hands over: spread by rows if it has some."""
  at = NamedSharding(run.mesh, _spec(_by_rows(run, aval)))
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
  """What the compiler says of a jitted function with its arguments, asked once."""
  start = time.monotonic()
  lowered = call.lower(*args)
  path = cache / f"{_digest(lowered, run, loops)}.json"
  if not path.exists():
    note(f"  {name}: compiling")
    made = _compile(lowered, name, run, loops)
    made = made._replace(seconds=round(time.monotonic() - start, 1))
    cache.mkdir(parents=True, exist_ok=True)
    kept = {field: each for field, each in made._asdict().items() if field != "given"}
    write_json(path, kept)
  told = read_json(path)
  told["collectives"] = [collectives_lib.Collective(*x) for x in told["collectives"]]
  # Numbers and a prompt's ids have no place of their own, and are small.
  placed = [
    x
    for x in jax.tree.leaves(args)
    if isinstance(x, jax.ShapeDtypeStruct) and x.sharding
  ]
  return CompiledProgram(**told, given=tuple(placed))


def _digest(lowered, run, loops) -> str:
  """Names a program, what it is compiled for, and by what."""
  devices = run.mesh.devices
  one = devices.flat[0]
  known = (
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
  return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


def _compile(lowered, name: str, run, loops) -> CompiledProgram:
  outputs = jax.tree.leaves(lowered.out_info)
  platform = run.mesh.devices.flat[0].platform
  try:
    done = lowered.compile(compiler_options=_OPTIONS.get(platform))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed = _TOO_MUCH.search(str(error))
    size = float(needed[1]) * _UNITS[needed[2]] if needed else float("inf")
    refused = str(error).splitlines()[0]
    rows = [_by_rows(run, x) for x in outputs]
    return CompiledProgram(name, size, 0, rows, [], 0.0, refused)
  memory = done.memory_analysis()
  peak = memory.peak_memory_in_bytes
  if platform == "cpu":  # Its peak leaves temporaries out: all at once, but donated.
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  found = collectives_lib.find_collectives(done.as_text(), run.mesh.devices.size, loops)
  at = jax.tree.leaves(done.output_shardings)
  return CompiledProgram(
    name,
    peak,
    memory.argument_size_in_bytes,
    [list(x.spec) for x in at],
    found,
    0.0,
  )


def _by_rows(run, x) -> list[Any]:
  if x.shape and x.shape[0] % sharding.num_batch_shards(run.mesh) == 0:
    return [["data", "fsdp"]]
  return []


def _spec(names: list[Any]) -> P:
  return P(*(tuple(each) if isinstance(each, list) else each for each in names))
