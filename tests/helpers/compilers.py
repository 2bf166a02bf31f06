"""Compilers for accelerators that this machine does not have.

The extra `test-compilers` installs them. Without it, tests marked `compilers` are
deselected; in CI a missing compiler is an error.
"""

import importlib.metadata
from collections.abc import Iterable, Mapping

import pytest

PACKAGES = ("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")


def missing(packages: Iterable[str] = PACKAGES) -> list[str]:
  """Returns the packages that are not installed."""
  return [name for name in packages if not _is_installed(name)]


def check(absent: list[str], environ: Mapping[str, str]) -> None:
  """Checks that CI has all compilers.

  Raises:
    pytest.UsageError: in CI (`CI=true`), and some are absent.
  """
  if absent and environ.get("CI") == "true":
    raise pytest.UsageError(
      f"CI runs tests that need {', '.join(absent)}: "
      'pip install -e ".[test,test-compilers]", and see '
      "tests/helpers/processor_oracle.py and tests/helpers/real_model.py"
    )


def split(
  items: Iterable[pytest.Item], absent: list[str], marker: str = "compilers"
) -> tuple[list[pytest.Item], list[pytest.Item]]:
  """Returns the tests to run and those to deselect."""
  run, deselected = [], []
  for item in items:
    needs = item.get_closest_marker(marker) is not None
    (deselected if absent and needs else run).append(item)
  return run, deselected


def _is_installed(name: str) -> bool:
  try:
    importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True
