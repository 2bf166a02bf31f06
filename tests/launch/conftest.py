"""Programs that stand in for those of a cluster."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def call(tmp_path):
  """Runs a script beside stand-ins for programs, and tells what those were given."""

  def run(script, *arguments, programs, **env):
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in programs.items():
      (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
      (folder / name).chmod(0o755)
    said = tmp_path / "said"
    said.write_text("")
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
      [ROOT / "launch" / "cluster" / script, *arguments],
      env={"PATH": path, "SAID": str(said), "PYTHON": str(folder / "python"), **env},
      capture_output=True,
      text=True,
      timeout=60,
    )
    return done, said.read_text().splitlines()

  return run
