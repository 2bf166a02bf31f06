"""What a build of the package contains, and its version."""

import pathlib
import re
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlmrlaif_jax
from tools import list_versions

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The names of the files of a wheel, and its metadata."""
  folder = tmp_path_factory.mktemp("wheel")
  build = f"from setuptools import build_meta as b; b.build_wheel({str(folder)!r})"
  sources = folder / "sources"
  copied = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "vlmrlaif_jax")
  sources.mkdir()
  for name in (*copied, "configs", "examples", "launch", "perf", "tests", "tools"):
    (sources / name).symlink_to(ROOT / name)
  subprocess.run([sys.executable, "-c", build], cwd=sources, check=True)
  (path,) = folder.glob("*.whl")
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    (metadata,) = (n for n in names if n.endswith("METADATA"))
    return names, archive.read(metadata).decode()


def test_a_wheel_contains_the_package_and_its_assets_alone(wheel):
  names, _ = wheel
  assert {"vlmrlaif_jax/py.typed", "vlmrlaif_jax/assets/gpus/h200.txtpb"} <= set(names)
  assert "vlmrlaif_jax/assets/tiny/model.safetensors" in names
  assert "vlmrlaif_jax/assets/tiny/clip/config.json" in names
  folders = {name.split("/")[0] for name in names}
  assert folders == {
    "vlmrlaif_jax",
    f"vlmrlaif_jax-{vlmrlaif_jax.__version__}.dist-info",
  }


def test_every_module_is_in_the_wheel(wheel):
  names, _ = wheel
  modules = (ROOT / "vlmrlaif_jax").rglob("*.py")
  assert {str(path.relative_to(ROOT)) for path in modules} <= set(names)


def test_a_wheel_has_the_version_of_the_package(wheel):
  found = re.search(r"^Version: (.+)$", wheel[1], re.M)
  assert found[1] == vlmrlaif_jax.__version__


def test_test_dependencies_have_no_compilers(wheel):
  extra = re.findall(r'^Requires-Dist: (.*extra == "test".*)$', wheel[1], re.M)
  assert extra and not [line for line in extra if re.search("tpu|cuda|nvidia", line)]


# constraints.txt.


@pytest.fixture(scope="module")
def pinned():
  lines = (ROOT / "constraints.txt").read_text().splitlines()
  pairs = (line.split("==") for line in lines if not line.startswith("#"))
  return dict(pairs)


def test_pinned_versions_satisfy_the_package(wheel, pinned):
  lines = re.findall(r"^Requires-Dist: (.+)$", wheel[1], re.M)
  needed = [(canonicalize_name(x.name), x) for x in map(Requirement, lines)]
  wrong = [
    f"{each}: {pinned[name]}"
    for name, each in needed
    if name in pinned and pinned[name] not in each.specifier
  ]
  assert wrong == []
  is_tested = lambda each: (
    each.marker is None or each.marker.evaluate({"extra": "test"})
  )
  assert {name for name, each in needed if is_tested(each)} <= set(pinned)


def test_versions_of_indirect_requirements_are_pinned(pinned):
  found = list_versions.find_required("pytest")
  assert {"iniconfig", "pluggy"} <= set(found) <= set(pinned) and "pytest" not in found


def test_no_version_is_that_of_a_build(pinned):
  assert "torch" in pinned
  assert all(re.fullmatch(r"[0-9][0-9a-z.!]*", version) for version in pinned.values())
