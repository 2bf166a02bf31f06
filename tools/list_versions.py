"""Writes constraints.txt: the versions that the tests ran with.

    python tools/list_versions.py > constraints.txt

It lists the installed packages that the package and its extras require, directly or
through others.
"""

import importlib.metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGE = "vlmrlaif_jax"
HEAD = "# Versions that the tests ran with, by tools/list_versions.py."


def find_required(package: str) -> dict[str, str]:
  """Returns the installed versions of all packages that a package requires.

  All its extras count, and of the others those that are requested.
  """
  versions: dict[str, str] = {}
  extras = importlib.metadata.metadata(package).get_all("Provides-Extra") or []
  todo = [(package, extra) for extra in ("", *extras)]
  seen = set(todo)
  while todo:
    name, extra = todo.pop()
    for line in importlib.metadata.requires(name) or []:
      needed = Requirement(line)
      if needed.marker and not needed.marker.evaluate({"extra": extra}):
        continue
      key = canonicalize_name(needed.name)
      try:
        version = Version(importlib.metadata.version(needed.name))
      except importlib.metadata.PackageNotFoundError:
        continue  # Of an extra that is not installed.
      versions[key] = version.public  # The local part names a build, such as "+cpu".
      more = {(key, each) for each in ("", *needed.extras)} - seen
      seen |= more
      todo += more
  versions.pop(canonicalize_name(package), None)
  return versions


if __name__ == "__main__":
  print(HEAD)
  for name, version in sorted(find_required(PACKAGE).items()):
    print(f"{name}=={version}")
