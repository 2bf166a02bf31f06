"""Runs another library's steps in a separate process.

perf/peers/protocol.py describes the messages.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from perf import jobs
from perf.model import Bench, get_prompt_len

SCRIPTS = {"trl": "trl_peer.py", "tunix": "tunix_peer.py"}  # In perf/peers/.
# The jobs of perf/jobs.py::JOBS that a peer can run, and whether ours then uses video.
SUPPORTED_JOBS = {
  "trl": ("sft", "dpo", "grpo", "sample", "load"),
  "tunix": ("grpo", "sample"),
}
VIDEO = {"trl": True, "tunix": False}
# Packages of each peer's environment.
REQUIRES = {
  "trl": ("trl", "peft", "torch==2.13.0"),
  "tunix": ("google-tunix",),
}


class Peers(NamedTuple):
  """The Python of each installed peer, by the name of its library."""

  pythons: dict[str, str]
  scripts: Path  # The folder perf/peers.


def describe_job(bench: Bench, what: str) -> dict[str, Any]:
  """Returns the settings of a peer's job, as numbers and strings."""
  size = bench.size
  start = get_prompt_len(size)
  job = dict(what=what, rank=bench.rank, dtype=size.dtype, remat=size.remat)
  job |= dict(threads=len(os.sched_getaffinity(0)), **size.llm)
  job |= dict(prompt=start, new=size.new, time=start + size.new, answer=size.new)
  job |= dict(rows=size.rows, prompts=size.prompts, group=size.group)
  if what == "load":
    job["folder"] = str(jobs.ensure_checkpoint(bench))
  return job


class Peer:
  """A process that runs one job at every request; close it, or use a `with` block."""

  def __init__(self, python: str, script: Path, job: dict[str, Any], log: Path):
    """Starts the process.

    Args:
      python: Python of the peer's environment.
      script: The peer's script.
      job: Settings from describe_job.
      log: File for the process's output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    self._log = log
    with log.open("w") as errors:
      self._process = subprocess.Popen(
        [python, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        # PyTorch's threads would otherwise spin while they wait, and take cores from
        # our runs.
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
      )
    self._send(json.dumps(job))

  def run(self) -> dict[str, Any]:
    """Runs the job once. Returns its "seconds", "tokens" and "software".

    Raises:
      RuntimeError: The process has ended; the message has the end of its output.
    """
    self._send("run")
    line = self._process.stdout.readline()
    if not line:
      self.close()
      end = "".join(self._log.read_text().splitlines(keepends=True)[-15:])
      raise RuntimeError(f"the peer has ended; see {self._log}, which ends:\n{end}")
    return json.loads(line)

  def _send(self, line: str) -> None:
    try:
      self._process.stdin.write(line + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # The process has ended, so `run` reads no reply and raises.

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()

  def __enter__(self) -> "Peer":
    return self

  def __exit__(self, *_) -> None:
    self.close()
