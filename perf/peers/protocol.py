"""Runs a benchmark peer: a process that runs a job once for each request.

The first line of stdin is JSON with the job's settings; each line after it requests a
run. The reply to a run is a line of JSON: its seconds and its number of tokens. This
module depends neither on vlmrlaif_jax nor on the peers' libraries.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Connection(NamedTuple):
  """The requested job and the function that replies."""

  job: dict[str, Any]  # Created by describe_job in perf/peer.py.
  reply: Callable[..., None]  # Its keywords are the fields of the reply.


def connect() -> Connection:
  """Reads the job; everything printed afterwards goes to stderr."""
  out = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def reply(**fields):
    out.write(json.dumps(fields) + "\n")
    out.flush()

  return Connection(json.loads(sys.stdin.readline()), reply)


def wait() -> float:
  """Waits for a request and returns its time; exits if the parent has closed stdin."""
  if not sys.stdin.readline():
    os._exit(0)  # A trainer would otherwise continue, or write a checkpoint.
  return time.perf_counter()


def serve(connection: Connection, run: Callable[[], int], **fields: Any) -> None:
  """Runs a job at every request.

  Args:
    connection: The connection.
    run: Runs the job and returns its number of tokens.
    **fields: Further fields of each reply.
  """
  while True:
    start = wait()
    tokens = run()
    connection.reply(seconds=time.perf_counter() - start, tokens=tokens, **fields)
