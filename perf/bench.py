"""Times training steps and sampling on random weights, next to other libraries.

Everything runs on one device. A peer library runs in its own process; its runs and ours
alternate and never overlap.
"""

import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from perf import jobs
from perf import peer as peer_lib
from perf.model import BASES, Bench, get_prompt_len
from vlmrlaif_jax.core.jsonl import JsonRow

# The cost curves: the field of Size that is varied, and its values.
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
  done: Sequence[JsonRow] = (),
) -> Iterator[JsonRow]:
  """Yields a row for each measurement as soon as it ends.

  Args:
    bench: The model and its work.
    what: Measurements, from WHAT.
    peers: Libraries to compare with.
    pairs: Number of timed runs.
    done: Rows of earlier measurements, which are skipped.

  Raises:
    ValueError: The base or a measurement is unknown.
  """
  if bench.base not in BASES:
    raise ValueError(f"--base must be one of {BASES}, got {bench.base!r}")
  if unknown := sorted(set(what) - set(WHAT)):
    raise ValueError(f"--what must be in {WHAT}, got {unknown}")
  for settings, run in _list_measurements(bench, what, peers, pairs):
    if any(settings.items() <= row.items() for row in done):
      continue
    name = " ".join(str(settings[key]) for key in ("size", "what", "peer"))
    print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
    yield settings | _describe_environment() | run()


def _list_measurements(
  bench: Bench, what: Sequence[str], peers: peer_lib.Peers, pairs: int
) -> Iterator[tuple[JsonRow, Callable[[], JsonRow]]]:
  """Yields the identifying settings of each row, and a function that measures it."""
  size = bench.size._asdict() | dict(bench.size.llm)
  fixed = {k: v for k, v in size.items() if k not in ("llm", "vision")}
  fixed |= dict(size=bench.name, base=bench.base, rank=bench.rank, pairs=pairs)
  for name in what:
    if name == "machine":
      yield dict(what=name, peer="", size=""), measure_machine
    elif name == "curves":
      for axis in CURVES:
        settings = dict(what="curve", peer=axis, points=list(CURVES[axis]))
        yield fixed | settings, partial(measure_curve, bench, axis, pairs=pairs)
    else:
      capable = [p for p in peers.pythons if name in peer_lib.SUPPORTED_JOBS[p]]
      for peer in capable or [""]:
        run = partial(compare_with_peer, bench, name, peer, peers, pairs)
        yield fixed | dict(what=name, peer=peer), run


def _describe_environment() -> JsonRow:
  """Returns the date, the machine and the software."""
  return dict(
    date=time.strftime("%Y-%m-%d"),
    device=jax.devices()[0].device_kind,
    machine=get_machine_name(),
    software=f"jax {jax.__version__}",
  )


def get_machine_name() -> str:
  """Returns the name of the processor and the number of cores."""
  about = pathlib.Path("/proc/cpuinfo")
  lines = about.read_text().splitlines() if about.exists() else []
  names = [line.split(":")[1].strip() for line in lines if "model name" in line]
  name = names[0] if names else platform.processor()
  return f"{len(os.sched_getaffinity(0))} cores of {name}"


def time_call(run: Callable[[], Any]) -> float:
  """Returns the seconds that `run` takes; `run` must wait for the device."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def compare_with_peer(
  bench: Bench, what: str, peer: str, peers: peer_lib.Peers, pairs: int
) -> JsonRow:
  """Times our job and the peer's in turns; ours alone if `peer` is "".

  The first run of each compiles and is reported separately. The second is discarded.

  Args:
    bench: The model and its work.
    what: Name of the job, from jobs.JOBS.
    peer: Name of the peer library, "" for none.
    peers: The peers' environments.
    pairs: Number of timed runs of each.

  Raises:
    ValueError: The two jobs process different numbers of tokens.
  """
  video = peer_lib.VIDEO[peer] if peer else True
  job = jobs.JOBS[what](bench, video=video)
  row = dict(video=video, tokens=job.tokens, flops=job.all.flops)
  row["prompt"] = get_prompt_len(bench.size)
  if peer:
    log = bench.scratch / f"{peer}-{bench.name}-{what}.log"
    script = peers.scripts / peer_lib.SCRIPTS[peer]
    settings = peer_lib.describe_job(bench, what)
    with peer_lib.Peer(peers.pythons[peer], script, settings, log) as other:
      row |= _run_in_turns(job, other, pairs)
  else:
    ours = [time_call(job.all.run) for _ in range(2 + pairs)]
    row |= dict(first=ours[0], ours=ours[2:])
  row |= dict(step_bytes=job.step_bytes, parts={})
  for name, part in job.parts.items():
    part.run()
    seconds = statistics.median(time_call(part.run) for _ in range(pairs))
    row["parts"][name] = dict(seconds=seconds, flops=part.flops)
  return row


def _run_in_turns(job: jobs.Job, other: peer_lib.Peer, pairs: int) -> JsonRow:
  ours, theirs = [], []
  for _ in range(2 + pairs):
    ours.append(time_call(job.all.run))
    reply = other.run()
    theirs.append(reply["seconds"])
    if reply["tokens"] != job.tokens:
      raise ValueError(
        f"ours took {job.tokens} tokens, and the peer {reply['tokens']}. Both must "
        "take the same number"
      )
  return dict(
    first=ours[0],
    ours=ours[2:],
    first_theirs=theirs[0],
    theirs=theirs[2:],
    peer_software=reply["software"],
  )


def measure_curve(bench: Bench, axis: str, *, pairs: int) -> JsonRow:
  """Returns the seconds of a GRPO step at each point of a curve."""
  seconds = []
  for value in CURVES[axis]:
    size = bench.size._replace(**{axis: value})
    run = jobs.make_grpo_job(bench._replace(size=size), video=True).all.run
    run(), run()
    seconds.append(statistics.median(time_call(run) for _ in range(pairs)))
  return dict(seconds=seconds)


def measure_machine() -> JsonRow:
  """Returns the device's peak FLOP/s of matmuls and its bytes per second."""
  large = jax.default_backend() != "cpu"
  side = 8192 if large else 2048
  row: JsonRow = {f"flops_{t}": _measure_matmul(side, t) for t in _TYPES}
  return row | dict(bytes_per_s=_measure_bandwidth(2**30 if large else 2**26))


_TYPES = ("float32", "bfloat16")


def _time_best(run: Callable[[], Any]) -> float:
  run()
  return min(time_call(run) for _ in range(20))


def _measure_matmul(side: int, dtype: str) -> float:
  x = jax.random.normal(jax.random.key(0), (side, side), dtype)
  product = jax.jit(lambda x: x @ x)
  return 2 * side**3 / _time_best(lambda: product(x).block_until_ready())


def _measure_bandwidth(count: int) -> float:
  """Times reading and writing `count` float32 numbers in place.

  A new array would have its pages allocated by the system, which takes longer.
  """
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  arrays = [jnp.ones(count, jnp.float32)]

  def run():
    arrays[0] = add(arrays[0]).block_until_ready()

  return 2 * 4 * count / _time_best(run)
