"""PROGRAM: speed with random weights, beside other libraries and beside the machine.

Everything runs on one device. A peer is a process of its own that stays alive; ours and
its runs alternate, and never overlap.
"""

import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from perf import jobs
from perf import peer as peer_lib
from perf.model import BASES, Bench, prompt_len

Row: TypeAlias = dict[str, Any]  # A line of the JSON file.

# The cost curves: what of a step of GRPO is changed, and to what.
CURVES = {
  "frames": (4, 16, 64, 256),
  "group": (2, 4, 8, 16),
  "new": (16, 32, 64, 128),
  "prompts": (1, 2, 4, 8),
}
WHAT = ("machine", *jobs.JOBS, "curves")


def measure(
  bench: Bench,
  what: Sequence[str],
  peers: peer_lib.Peers,
  *,
  pairs: int,
  done: Sequence[Row] = (),
) -> Iterator[Row]:
  """A row for each thing that was measured, as soon as it was.

  Args:
    bench: the sizes to measure at.
    what: some of WHAT.
    peers: those that are to be measured beside ours.
    pairs: runs of which the median is taken.
    done: rows of before, which are not measured again.

  Raises:
    ValueError: an unknown base, or unknown things to measure.
  """
  if bench.base not in BASES:
    raise ValueError(f"base must be one of {BASES}, not {bench.base!r}")
  if unknown := sorted(set(what) - set(WHAT)):
    raise ValueError(f"what must be of {WHAT}, not {unknown}")
  for settings, run in _plan(bench, what, peers, pairs):
    if any(settings.items() <= row.items() for row in done):
      continue
    name = " ".join(str(settings[key]) for key in ("size", "what", "peer"))
    print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
    yield settings | _where() | run()


def _plan(
  bench: Bench, what: Sequence[str], peers: peer_lib.Peers, pairs: int
) -> Iterator[tuple[Row, Callable[[], Row]]]:
  """What makes each row another than all others, and what makes the row."""
  size = bench.size._asdict() | dict(bench.size.llm)
  fixed = {k: v for k, v in size.items() if k not in ("llm", "vision")}
  fixed |= dict(size=bench.name, base=bench.base, rank=bench.rank, pairs=pairs)
  for name in what:
    if name == "machine":
      yield dict(what=name, peer="", size=""), machine
    elif name == "curves":
      for axis in CURVES:
        settings = dict(what="curve", peer=axis, points=list(CURVES[axis]))
        yield fixed | settings, lambda axis=axis: curve(bench, axis, pairs=pairs)
    else:
      able = [p for p in peers.pythons if name in peer_lib.DOES[p]]
      for peer in able or [""]:
        run = lambda name=name, peer=peer: compare(bench, name, peer, peers, pairs)
        yield fixed | dict(what=name, peer=peer), run


def _where() -> Row:
  """When, on what, and with what."""
  return dict(
    date=time.strftime("%Y-%m-%d"),
    device=jax.devices()[0].device_kind,
    machine=machine_name(),
    software=f"jax {jax.__version__}",
  )


def machine_name() -> str:
  """The processor, and how much of it there is."""
  about = pathlib.Path("/proc/cpuinfo")
  lines = about.read_text().splitlines() if about.exists() else []
  names = [line.split(":")[1].strip() for line in lines if "model name" in line]
  name = names[0] if names else platform.processor()
  return f"{len(os.sched_getaffinity(0))} cores of {name}"


def clock(run: Callable[[], Any]) -> float:
  """The seconds that `run` takes; it is to return when the device is done."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def compare(
  bench: Bench, what: str, peer: str, peers: peer_lib.Peers, pairs: int
) -> Row:
  """Runs ours and the peer's in turn; ours alone if `peer` is "".

  The first run of each, which compiles, is told apart; the second is not counted.

  Raises:
    ValueError: the two did not take as many tokens.
  """
  video = peer_lib.VIDEO[peer] if peer else True
  job = jobs.JOBS[what](bench, video=video)
  row = dict(video=video, tokens=job.tokens, flops=job.all.flops)
  row["prompt"] = prompt_len(bench.size)
  if peer:
    log = bench.scratch / f"{peer}-{bench.name}-{what}.log"
    script = peers.scripts / peer_lib.SCRIPTS[peer]
    asked = peer_lib.job_of(bench, what)
    with peer_lib.Peer(peers.pythons[peer], script, asked, log) as other:
      row |= _in_turn(job, other, pairs)
  else:
    ours = [clock(job.all.run) for _ in range(2 + pairs)]
    row |= dict(first=ours[0], ours=ours[2:])
  row |= dict(step_bytes=job.step_bytes, parts={})
  for name, part in job.parts.items():
    part.run()
    seconds = statistics.median(clock(part.run) for _ in range(pairs))
    row["parts"][name] = dict(seconds=seconds, flops=part.flops)
  return row


def _in_turn(job: jobs.Job, other: peer_lib.Peer, pairs: int) -> Row:
  ours, theirs = [], []
  for _ in range(2 + pairs):
    ours.append(clock(job.all.run))
    told = other.run()
    theirs.append(told["seconds"])
    if told["tokens"] != job.tokens:
      raise ValueError(
        f"ours took {job.tokens} tokens, and the peer {told['tokens']}: their seconds "
        "cannot be compared"
      )
  return dict(
    first=ours[0],
    ours=ours[2:],
    first_theirs=theirs[0],
    theirs=theirs[2:],
    peer_software=told["software"],
  )


def curve(bench: Bench, axis: str, *, pairs: int) -> Row:
  """Seconds of a step of GRPO at each point of an axis."""
  seconds = []
  for value in CURVES[axis]:
    size = bench.size._replace(**{axis: value})
    run = jobs.by_group(bench._replace(size=size), video=True).all.run
    run(), run()
    seconds.append(statistics.median(clock(run) for _ in range(pairs)))
  return dict(seconds=seconds)


def machine() -> Row:
  """The most that is seen of this device: FLOP/s of matmuls, and bytes/s."""
  large = jax.default_backend() != "cpu"
  found = {f"flops_{t}": _matmul(8192 if large else 2048, t) for t in _TYPES}
  return found | dict(bytes_per_s=_bandwidth(2**30 if large else 2**26))


_TYPES = ("float32", "bfloat16")


def _best(run: Callable[[], Any]) -> float:
  run()
  return min(clock(run) for _ in range(20))


def _matmul(side: int, dtype: str) -> float:
  x = jax.random.normal(jax.random.key(0), (side, side), dtype)
  product = jax.jit(lambda x: x @ x)
  return 2 * side**3 / _best(lambda: product(x).block_until_ready())


def _bandwidth(count: int) -> float:
  """Of reading `count` numbers in float32 and writing as many, in their place.

  A fresh array would be given by the system page by page, which takes longer.
  """
  add, held = jax.jit(lambda x: x + 1, donate_argnums=0), [jnp.ones(count, jnp.float32)]

  def run():
    held[0] = add(held[0]).block_until_ready()

  return 2 * 4 * count / _best(run)
