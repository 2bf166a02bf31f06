"""Pages of the API reference, generated while the site is built.

The navigation in mkdocs.yml lists them: api/PACKAGE.md for each package. Each contains
the modules of its package, which mkdocstrings renders from their docstrings.
"""

import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "vlmrlaif_jax"


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds a page for each package; mkdocs calls it."""
  for package in list_packages():
    name = f"api/{package.name}.md"
    files.append(File.generated(config, name, content=render_page(package)))
  return files


def list_packages() -> list[pathlib.Path]:
  """Returns the folders of the packages directly below vlmrlaif_jax."""
  return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def render_page(package: pathlib.Path) -> str:
  """Returns the Markdown of a package's page: a section for each module."""
  parts = [f"# {package.name}", f"::: {_dotted(package)}"]
  for path in sorted(package.rglob("*.py")):
    if path.name != "__init__.py":
      module = path.with_suffix("")
      parts += [f"## {_dotted(module.relative_to(PACKAGE))}", f"::: {_dotted(module)}"]
  return "\n\n".join(parts) + "\n"


def _dotted(path: pathlib.Path) -> str:
  relative = path.relative_to(ROOT) if path.is_absolute() else path
  return ".".join(relative.parts)
