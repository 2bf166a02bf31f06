"""The examples in docstrings are run; their arrays have three digits."""

import doctest
import importlib
import importlib.util
import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for path in sorted((ROOT / "vlmrlaif_jax").rglob("*.py"))
  if re.search(r"^ +>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
  # lmms-eval has pins of its own, and its tests use a stand-in.
  and (path.name != "lmms_model.py" or importlib.util.find_spec("lmms_eval"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
  with np.printoptions(precision=3, suppress=True):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
