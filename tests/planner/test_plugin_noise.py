"""planner/topologies.py: lines of the CUDA plugin are dropped, all others are kept."""

import os

import pytest

from vlmrlaif_jax.planner.topologies import drop_plugin_noise


def test_only_the_lines_of_the_plugin_are_dropped(capfd):
  with drop_plugin_noise():
    os.write(
      2, b"I0000 cudart_stub.cc:31] Could not find cuda drivers on your machine\n"
    )
    os.write(2, b"a real error\n")
  os.write(2, b"later\n")
  assert capfd.readouterr().err == "a real error\nlater\n"


def test_stderr_returns_after_an_error(capfd):
  with pytest.raises(ValueError, match="it"), drop_plugin_noise():
    os.write(2, b"before\n")
    raise ValueError("it")
  os.write(2, b"after\n")
  assert capfd.readouterr().err == "before\nafter\n"
