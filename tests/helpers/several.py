"""Real processes on this machine that work together, for tests."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
WITHOUT_TORCH = ROOT / "tests/helpers/without_torch"


def environment(devices=1, *, torch=False, **more):
  """The environment of a program that a test starts, which compiles as tests do.

  Args:
    devices: that the program has.
    torch: whether it can import torch. Users have none, and to import it takes long.
    more: variables.
  """
  count = f"--xla_force_host_platform_device_count={devices}"  # The last one counts.
  return {
    **os.environ,
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}",
    "PYTHONPATH": os.pathsep.join(map(str, [ROOT] + [WITHOUT_TORCH] * (not torch))),
    **more,
  }


def free_port():
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def start(command, processes, folder, *, devices, **env):
  """The processes of a command, each with so many devices; output goes to folder/I.

  Args:
    command: from the coordinator's address and the number of the process.
    env: more of the environment.
  """
  folder.mkdir(parents=True, exist_ok=True)
  coordinator = f"localhost:{free_port()}"
  started = []
  for number in range(processes):
    with (folder / str(number)).open("w") as log:
      started.append(
        subprocess.Popen(
          [sys.executable, *command(coordinator, number)],
          cwd=ROOT,
          env=environment(devices, **env),
          stdout=log,
          stderr=log,
        )
      )
  return started


def said(folder, number):
  return (folder / str(number)).read_text()


def finish(started, folder, *, limit_s=600):
  """Waits for processes that are to end well."""
  for number, process in enumerate(started):
    assert process.wait(limit_s) == 0, said(folder, number)[-3000:]


def line():
  """16 rows of three numbers, and of what is to be learned from them."""
  x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
  return x, x @ np.array([1, 2, 3], np.float32) + 1
