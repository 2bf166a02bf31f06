"""The collectives of a compiled program: which, how many bytes, how often."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

CACHE_VERSION = 3  # Of what is read here; what was kept of an older one is not.
COLLECTIVE_KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "collective-broadcast",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}  # Others say their bits: "bf16", "f8e4m3fn".
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVE_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN = re.compile(r'known_trip_count"?:?\s*\{"?n"?:\s*"?(\d+)')
_ORDER = re.compile(r" compare\(.*direction=[LG][TE]")
_LIMIT = re.compile(r" [su]32\[\][^ ]* constant\((\d+)\)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"('\w+')=(\d+)")
_PART = re.compile(r"('\w+')(?::\(\d+\)(\d+))?")  # An axis, or some of its devices.


class Collective(NamedTuple):
  """One of a program's, with all its repetitions."""

  kind: str
  bytes: float  # That each device receives, in all.
  runs: float  # How often it runs.
  group: int  # Devices that take part together.
  loop: str  # The name of the loop that it is in; "" for none that has a name.


def find_collectives(
  text: str, devices: int, loops: Mapping[int, str] | None = None
) -> list[Collective]:
  """The collectives of a program, a loop's as often as the loop runs.

  Args:
    text: compiled.as_text().
    devices: of the program.
    loops: names of loops by how often they run at most, such as {896: "decode"}. A
      loop that ends when it finds that it has done is taken for the first of them.
  """
  bodies, entry = _computations(text)
  return list(_walk(bodies, entry, 1.0, "", devices, loops or {}))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation by its name, and the name of the entry."""
  found: dict[str, list[str]] = {}
  current: list[str] | None = None
  entry = ""
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      found[head[1]] = current = []
      entry = head[1] if line.startswith("ENTRY") else entry
    elif line == "}":  # Kernels' own settings may begin a line with one.
      current = None
    elif current is not None:
      current.append(line)
  return found, entry


def _walk(bodies, name, times, loop, devices, loops) -> Iterator[Collective]:
  for line in bodies[name]:
    if found := _COLLECTIVE.search(line):
      group = _group(line, devices)
      received = _received(found[2], found[1], bool(found[3]), group)
      yield Collective(found[2], received * times, times, group, loop)
    elif found := _LOOP.search(line):
      trips = _trips(line, bodies, found[1]) or next(iter(loops), 1)
      inside = loop or loops.get(trips, "")
      yield from _walk(bodies, found[2], times * trips, inside, devices, loops)
    elif "-done(" not in line and "-update(" not in line:
      called = _CALLED.findall(line)
      if branches := _BRANCHES.search(line):
        called += [each.strip().lstrip("%") for each in branches[1].split(",")]
      for other in called:
        if other in bodies:
          yield from _walk(bodies, other, times, loop, devices, loops)


def _trips(line: str, bodies, condition: str) -> int:
  """How often a loop runs, at most: the compiler says so, or its condition compares
  with it; 0 where neither does.
  """
  if known := _KNOWN.search(line):
    return int(known[1])
  lines = list(_with_called(bodies, condition))
  if not any(map(_ORDER.search, lines)):
    return 0
  return max((int(n) for line in lines for n in _LIMIT.findall(line)), default=0)


def _with_called(bodies, name: str) -> Iterator[str]:
  """The lines of a computation, and of those that it calls."""
  for line in bodies[name]:
    yield line
    for other in _CALLED.findall(line):
      yield from _with_called(bodies, other)


def _group(line: str, devices: int) -> int:
  """How many exchange, of replica_groups=[groups,each]<=[...], {{0,1},...}, or
  mesh['a'=4,'b'=2] {'b'}.
  """
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(listed[1].split(","))
  if over := _MESH.search(line):
    sizes = dict(_AXIS.findall(over[1]))
    return math.prod(int(n or sizes[axis]) for axis, n in _PART.findall(over[2]))
  return devices


def _received(kind: str, shape: str, start: bool, group: int) -> float:
  """Bytes that each device gets from the others, by the best algorithm there is."""
  sizes = [_size(kind_, dims) for kind_, dims in _SHAPE.findall(shape)]
  if start and kind == "collective-permute":
    sizes = sizes[1:2]  # (operand, result, contexts).
  elif start and kind == "all-gather":
    sizes = sizes[len(sizes) // 2 :]  # (operands, results).
  result, others = sum(sizes, start=0.0), group - 1
  if kind == "collective-permute":
    return result
  if kind == "all-reduce":
    return 2 * result * others / group
  if kind == "reduce-scatter":
    return result * others
  return result * others / group


def _size(kind: str, dims: str) -> float:
  bits = re.search(r"\d+", kind)
  width = _BYTES.get(kind, int(bits[0]) / 8 if bits else 0)
  return float(width * math.prod(int(n) for n in dims.split(",") if n))
