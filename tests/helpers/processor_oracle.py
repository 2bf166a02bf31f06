"""Processors of transformers, run in a process of their own.

They require torchvision, whose wheel does not load next to a CPU build of torch: it
registers shapes for compiled operators that are missing. To declare these operators
first is enough, because the processors run none of them. Where torchvision is found,
transformers imports it for most models, so it is in a folder that only this process
reads:

folder=$(python -c 'import sys; print(sys.prefix)')/torchvision
pip install --no-deps --target "$folder" torchvision==0.28.0

Without it, tests marked `torchvision` are deselected; in CI that is an error.
"""

import operator
import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

FOLDER = pathlib.Path(sys.prefix) / "torchvision"
REPOSITORY = pathlib.Path(__file__).parents[2]
_ENTRY = "from tests.helpers import processor_oracle; processor_oracle.main()"


class Call(NamedTuple):
  """A call of an object of transformers, or the object itself."""

  name: str  # Name of the class in transformers, or of its method that makes one.
  settings: dict[str, Any]  # Arguments of that, of which some may be a Call.
  arguments: dict[str, Any] = {}  # Arguments of the call.


def missing() -> list[str]:
  """Returns the folder of torchvision if there is none."""
  return [] if FOLDER.is_dir() else [str(FOLDER)]


def run_calls(calls: list[Call]) -> list[dict[str, Any]]:
  """Returns the outputs of calls, with NumPy arrays."""
  path = os.pathsep.join([str(FOLDER), str(REPOSITORY), *filter(None, sys.path)])
  process = subprocess.run(
    [sys.executable, "-c", _ENTRY],
    input=pickle.dumps(calls),
    env={**os.environ, "PYTHONPATH": path},
    stdout=subprocess.PIPE,
    check=True,
  )
  return pickle.loads(process.stdout)


def main() -> None:
  """Reads calls from the standard input and writes their outputs."""
  library = _declare_operators()
  import torch

  outputs = [
    {
      key: value.numpy() if isinstance(value, torch.Tensor) else value
      for key, value in _build(call)(**call.arguments, return_tensors="pt").items()
    }
    for call in pickle.load(sys.stdin.buffer)
  ]
  sys.stdout.buffer.write(pickle.dumps(outputs))
  del library


def _declare_operators():
  """Declares operators; they last as long as the library that is returned."""
  import torch

  library = torch.library.Library("torchvision", "DEF")
  for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
  return library


def _build(call: Call):
  import transformers

  settings = {
    name: _build(value) if isinstance(value, Call) else value
    for name, value in call.settings.items()
  }
  return operator.attrgetter(call.name)(transformers)(**settings)
