"""Drops log lines of JAX's CUDA plugin on machines without a GPU.

The plugin is installed to compile for GPUs, and logs when JAX loads it. It logs before
its log level can be set, so `drop_plugin_noise` filters the process's stderr.
"""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_NOISE = re.compile(
  rb"Could not find cuda drivers|before absl::InitializeLog\(\) is called"
)


@contextmanager
def drop_plugin_noise() -> Iterator[None]:
  """Holds back stderr during the block, then writes it without the plugin's lines."""
  sys.stderr.flush()
  terminal = os.dup(2)
  with tempfile.TemporaryFile() as buffer:
    os.dup2(buffer.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(terminal, 2)
      os.close(terminal)
      buffer.seek(0)
      for line in buffer:
        if not _NOISE.search(line):
          os.write(2, line)


def import_jax() -> None:
  """Imports jax, which reads the environment, without the plugin's log lines."""
  with drop_plugin_noise():
    importlib.import_module("jax")


def init_backend() -> None:
  """Initializes JAX's backend without the plugin's log lines.

  With several processes, call it after they are connected.
  """
  import jax

  with drop_plugin_noise():
    jax.devices()
