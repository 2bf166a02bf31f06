"""Another library beside ours: a process that runs a step whenever it is told to.

See perf/peers/protocol.py for what is said between the two.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from perf import jobs
from perf.model import Bench, prompt_len

SCRIPTS = {"trl": "trl_peer.py", "tunix": "tunix_peer.py"}  # In perf/peers/.
# What of perf/jobs.py::JOBS each of them does, and whether ours is given a video then.
DOES = {
  "trl": ("sft", "dpo", "grpo", "sample", "load"),
  "tunix": ("grpo", "sample"),
}
VIDEO = {"trl": True, "tunix": False}
# What is installed for each, in an environment of its own.
REQUIRES = {
  "trl": ("trl", "peft", "torch==2.13.0"),
  "tunix": ("google-tunix",),
}


class Peers(NamedTuple):
  """The Python of each environment that there is, by the name of its library."""

  pythons: dict[str, str]
  scripts: Path  # The folder launch/.


def job_of(bench: Bench, what: str) -> dict[str, Any]:
  """What a peer is asked for: numbers and words, all it knows of us."""
  size = bench.size
  start = prompt_len(size)
  job = dict(what=what, rank=bench.rank, dtype=size.dtype, remat=size.remat)
  job |= dict(threads=len(os.sched_getaffinity(0)), **size.llm)
  job |= dict(prompt=start, new=size.new, time=start + size.new, answer=size.new)
  job |= dict(rows=size.rows, prompts=size.prompts, group=size.group)
  if what == "load":
    job["folder"] = str(jobs.checkpoint_of(bench))
  return job


class Peer:
  """A process that has been told what to run. Close it, or use it in a `with`."""

  def __init__(self, python: str, script: Path, job: dict[str, Any], log: Path):
    """Starts the process.

    Args:
      python: of the peer's environment.
      script: what it is to run.
      job: see job_of.
      log: file that gets what it prints.
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
        # Threads of PyTorch that wait for one another in a loop would take the
        # processor from ours.
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
      )
    self._say(json.dumps(job))

  def run(self) -> dict[str, Any]:
    """One run: its "seconds", "tokens" and "software".

    Raises:
      RuntimeError: the process has ended; with the end of what it printed.
    """
    self._say("run")
    line = self._process.stdout.readline()
    if not line:
      self.close()
      end = "".join(self._log.read_text().splitlines(keepends=True)[-15:])
      raise RuntimeError(f"the peer ended; the end of {self._log}:\n{end}")
    return json.loads(line)

  def _say(self, line: str) -> None:
    try:
      self._process.stdin.write(line + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # That it has ended is told by what it answers: nothing.

  def close(self) -> None:
    """Ends the process, whatever it is at."""
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()

  def __enter__(self) -> "Peer":
    return self

  def __exit__(self, *_) -> None:
    self.close()
