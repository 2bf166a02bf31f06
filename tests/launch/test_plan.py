"""launch/plan.py: its help."""

import pathlib
import subprocess
import sys

import pytest

from tests.helpers import several

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_shows_how_to_plan(argv):
  result = subprocess.run(
    [sys.executable, "launch/plan.py", *argv],
    cwd=ROOT,
    env=several.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert "--config=configs/ppo.py:7b --topology=v5e-16" in result.stdout
  assert "--topology:" in result.stdout and result.stderr == ""


def test_missing_topology_is_an_error_that_names_the_flag():
  result = subprocess.run(
    [sys.executable, "launch/plan.py", "--config=configs/ppo.py"],
    cwd=ROOT,
    env=several.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode != 0 and "--topology" in result.stderr
