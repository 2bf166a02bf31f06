"""Checks the layout of the package: the tiers of imports, and the size of folders.

An import goes to a lower tier or stays inside its own package. No folder holds more
than twelve modules. tools/draw_packages.py lists the tiers.
"""

import ast
import pathlib

import pytest

from tools.draw_packages import NEVER, TIER

REPOSITORY = pathlib.Path(__file__).parents[1]
ROOT = REPOSITORY / "vlmrlaif_jax"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.stat().st_size)

MOST_MODULES = 12
NOT_INSTALLED = {"configs", "examples", "launch", "perf", "tests", "tools"}


def package_of(path):
  return path.relative_to(ROOT).parts[0]


def imports_of(path):
  """The absolute names of all that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} imports relatively; imports are absolute here"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(name):
  """The files of ours that importing a name runs: a module, or one it is from."""
  parts = name.split(".")
  if parts[0] != ROOT.name:
    return
  for count in range(2, len(parts) + 1):
    at = ROOT.joinpath(*parts[1:count])
    yield from (p for p in (at.with_suffix(".py"), at / "__init__.py") if p.exists())


def all_files_behind(path):
  """A file and all of ours that it imports, and they import."""
  seen, todo = set(), [path]
  while todo:
    path = todo.pop()
    if path not in seen:
      seen.add(path)
      todo += [file for name in imports_of(path) for file in files_of(name)]
  return seen


def libraries_of(path):
  return {name.split(".")[0] for name in imports_of(path)}


def short_path(path):
  return str(path.relative_to(ROOT))


def higher_imports(path):
  """The packages that a file imports and must not: not its own, nor of a lower tier."""
  own = package_of(path)
  imported = {package_of(f) for name in imports_of(path) for f in files_of(name)}
  return {p for p in imported if p != own and TIER[p] >= TIER[own]}


def test_every_package_has_a_tier():
  folders = {p.name for p in ROOT.iterdir() if p.is_dir() and list(p.glob("*.py"))}
  assert folders == set(TIER)


@pytest.mark.parametrize("path", FILES, ids=short_path)
def test_imports_go_to_lower_tiers(path):
  if path.parent != ROOT:
    assert not higher_imports(path)


@pytest.mark.parametrize("package", NEVER)
def test_package_does_not_import_forbidden_libraries(package):
  for path in FILES:
    if package_of(path) == package:
      assert not libraries_of(path) & NEVER[package], short_path(path)


def test_package_does_not_import_what_is_not_installed_with_it():
  for path in FILES:
    assert not libraries_of(path) & NOT_INSTALLED, short_path(path)


def test_only_checkpoint_imports_orbax():
  importing = [short_path(path) for path in FILES if "orbax" in libraries_of(path)]
  assert importing == ["training/checkpoint.py"]


def test_report_needs_no_jax():
  for path in (ROOT / "report").glob("*.py"):
    for file in all_files_behind(path):
      assert "jax" not in libraries_of(file), f"{path.name} imports {short_path(file)}"


def test_no_folder_has_too_many_modules():
  for folder in {path.parent for path in FILES}:
    modules = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, short_path(folder)


def test_the_rule_sees_through_every_way_to_import(tmp_path):
  file = tmp_path / "x.py"
  file.write_text(
    "from vlmrlaif_jax.core import types\n"
    "def f():\n  import vlmrlaif_jax.losses.masked as m\n"
    "from vlmrlaif_jax.models.layers import Dense\n"
  )
  found = {package_of(f) for name in imports_of(file) for f in files_of(name)}
  assert found == {"core", "losses", "models"}
