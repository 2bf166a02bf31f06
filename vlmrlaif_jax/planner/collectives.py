"""Finds the collectives of a compiled program, their bytes and how often they run."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Version of cached results; increment it when the parser changes.
CACHE_VERSION = 3
COLLECTIVE_KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "collective-broadcast",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}  # Other names contain bits: "f8e4m3fn".
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVE_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count"?:?\s*\{"?n"?:\s*"?(\d+)')
_ORDER = re.compile(r" compare\(.*direction=[LG][TE]")
_LIMIT = re.compile(r" [su]32\[\][^ ]* constant\((\d+)\)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"('\w+')=(\d+)")
_PART = re.compile(r"('\w+')(?::\(\d+\)(\d+))?")  # A mesh axis or a part of one.


class Collective(NamedTuple):
  """A collective of a program, with all its repetitions."""

  kind: str
  bytes: float  # Bytes that each device receives in all repetitions.
  runs: float  # Number of repetitions.
  group: int  # Devices that take part.
  loop: str  # Name of the enclosing loop; "" if none has a name.


def find_collectives(
  text: str, devices: int, loops: Mapping[int, str] | None = None
) -> list[Collective]:
  """Lists the collectives of a program, repeated as often as their loops.

  Args:
    text: HLO of the program, from `compiled.as_text()`.
    devices: Number of devices of the program.
    loops: Names of loops by their greatest number of iterations: {896: "decode"}. A
      loop without a known limit counts as the first of them.
  """
  bodies, entry = _split_computations(text)
  return list(_walk(bodies, entry, 1.0, "", devices, loops or {}))


def _split_computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation by name, and the entry's name."""
  computations: dict[str, list[str]] = {}
  current: list[str] | None = None
  entry = ""
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      computations[head[1]] = current = []
      entry = head[1] if line.startswith("ENTRY") else entry
    elif line == "}":  # A kernel's settings may start a line with a brace.
      current = None
    elif current is not None:
      current.append(line)
  return computations, entry


def _walk(bodies, name, times, loop, devices, loops) -> Iterator[Collective]:
  for line in bodies[name]:
    if match := _COLLECTIVE.search(line):
      group = _parse_group_size(line, devices)
      received = _count_received_bytes(match[2], match[1], bool(match[3]), group)
      yield Collective(match[2], received * times, times, group, loop)
    elif match := _LOOP.search(line):
      trips = _count_trips(line, bodies, match[1]) or next(iter(loops), 1)
      inside = loop or loops.get(trips, "")
      yield from _walk(bodies, match[2], times * trips, inside, devices, loops)
    elif "-done(" not in line and "-update(" not in line:
      called = _CALLS.findall(line)
      if branches := _BRANCHES.search(line):
        called += [each.strip().lstrip("%") for each in branches[1].split(",")]
      for other in called:
        if other in bodies:
          yield from _walk(bodies, other, times, loop, devices, loops)


def _count_trips(line: str, bodies, condition: str) -> int:
  """Returns a loop's greatest number of iterations, 0 if it is unknown.

  The compiler annotates it, or the loop's condition compares with it.
  """
  if known := _TRIP_COUNT.search(line):
    return int(known[1])
  lines = list(_list_lines(bodies, condition))
  if not any(map(_ORDER.search, lines)):
    return 0
  return max((int(n) for line in lines for n in _LIMIT.findall(line)), default=0)


def _list_lines(bodies, name: str) -> Iterator[str]:
  """Yields the lines of a computation and of those that it calls."""
  for line in bodies[name]:
    yield line
    for other in _CALLS.findall(line):
      yield from _list_lines(bodies, other)


def _parse_group_size(line: str, devices: int) -> int:
  """Returns the number of devices in a replica group.

  Forms are [groups,size]<=[...], {{0,1},...} and mesh['a'=4,'b'=2] {'b'}.
  """
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(listed[1].split(","))
  if over := _MESH.search(line):
    sizes = dict(_AXIS.findall(over[1]))
    return math.prod(int(n or sizes[axis]) for axis, n in _PART.findall(over[2]))
  return devices


def _count_received_bytes(kind: str, shape: str, start: bool, group: int) -> float:
  """Returns the bytes that each device receives with an optimal algorithm."""
  sizes = [_count_bytes(kind_, dims) for kind_, dims in _SHAPE.findall(shape)]
  if start and kind == "collective-permute":
    sizes = sizes[1:2]  # The shape is (operand, result, contexts).
  elif start and kind == "all-gather":
    sizes = sizes[len(sizes) // 2 :]  # The shape is (operands, results).
  result, others = sum(sizes, start=0.0), group - 1
  if kind == "collective-permute":
    return result
  if kind == "all-reduce":
    return 2 * result * others / group
  if kind == "reduce-scatter":
    return result * others
  return result * others / group


def _count_bytes(kind: str, dims: str) -> float:
  bits = re.search(r"\d+", kind)
  width = _BYTES.get(kind, int(bits[0]) / 8 if bits else 0)
  return float(width * math.prod(int(n) for n in dims.split(",") if n))
