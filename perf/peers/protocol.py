"""A benchmark's peer, in a process of its own: it runs a step whenever it is told to.

The first line that comes in is JSON and says what is to be measured; each line after it
asks for one run. Each run is answered by a line of JSON: its seconds, and how many
tokens it took. Nothing here knows of vlmrlaif_jax, or of the peers.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Line(NamedTuple):
  """What a peer is asked for, and where its answers go."""

  job: dict[str, Any]  # See job_of in perf/peer.py.
  answer: Callable[..., None]  # Its keywords are the answer.


def begin() -> Line:
  """Reads the job. Whatever is printed from now on goes to stderr."""
  out = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def answer(**told):
    out.write(json.dumps(told) + "\n")
    out.flush()

  return Line(json.loads(sys.stdin.readline()), answer)


def wait() -> float:
  """Waits until a run is asked for, and says when that was; ends with its parent."""
  if not sys.stdin.readline():
    os._exit(0)  # Trainers would go on, or save what nobody wants.
  return time.perf_counter()


def serve(line: Line, run: Callable[[], int], **told: Any) -> None:
  """Runs what returns its number of tokens, whenever a run is asked for."""
  while True:
    start = wait()
    tokens = run()
    line.answer(seconds=time.perf_counter() - start, tokens=tokens, **told)
