"""A run of the real program that was left alone, with which others are compared."""

import functools

import pytest

from tests.faults import program


@pytest.fixture(scope="session")
def whole(tiny_settings, tmp_path_factory):
  """(command of a workdir, the folder with the workdir of a run left alone)."""
  folder = tmp_path_factory.mktemp("disk") / "whole"
  command = functools.partial(program.make_command, tiny_settings)
  program.check_whole(program.run(command(folder / "run")))
  return command, folder


@pytest.fixture
def tmpdir(tmp_path):
  """A folder for temporary files, by which processes are found."""
  folder = tmp_path / "temporary"
  folder.mkdir()
  return folder
