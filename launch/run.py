"""Runs a recipe: python launch/run.py --config=configs/ppo.py[:preset] --workdir=DIR.

Any setting can be given as --config.SECTION.NAME=VALUE. Stages that are done in the
workdir are skipped, and one that was killed goes on where it was.
"""

import difflib
import importlib.util
import itertools
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Recipes import each other as configs.NAME.

from absl import app, flags, logging  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from vlmrlaif_jax import topologies  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: FILE[:PRESET].")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run goes.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)  # Libraries tell more than anyone wants.
  from vlmrlaif_jax import pretrain, recipe

  try:
    if CONFIG.value.recipe == "pretrain":
      pretrain.run(CONFIG.value, WORKDIR.value)
    else:
      recipe.run(CONFIG.value, WORKDIR.value)
  except (recipe.RecipeError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def check_overrides(argv: list[str]) -> None:
  """Refuses --config.KEY=VALUE whose key the recipe does not have."""
  chosen = [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
  chosen += [b for a, b in itertools.pairwise(argv) if a == "--config"]
  if not chosen:
    return
  keys = sorted(leaves(load(chosen[-1])))
  for argument in argv:
    if not argument.startswith("--config."):
      continue
    key = argument.removeprefix("--config.").split("=", 1)[0]
    if key not in keys:
      near = difflib.get_close_matches(key, keys, n=3, cutoff=0.4)
      hint = f"; did you mean {' or '.join(near)}?" if near else ""
      print(f"error: {chosen[-1]} has no setting {key!r}{hint}", file=sys.stderr)
      sys.exit(2)


def load(chosen: str) -> ConfigDict:
  """The config of FILE[:PRESET]."""
  path, _, preset = chosen.partition(":")
  if not pathlib.Path(path).exists():
    there = ", ".join(sorted(p.name for p in (ROOT / "configs").glob("*.py")))
    print(f"error: no recipe at {path}; in configs/ there are {there}", file=sys.stderr)
    sys.exit(2)
  spec = importlib.util.spec_from_file_location("recipe_file", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    return module.get_config(preset) if preset else module.get_config()
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def leaves(config: ConfigDict, at: str = "") -> list[str]:
  """The keys of all settings, as a.b.c."""
  found = []
  for key, value in config.items():
    name = f"{at}{key}"
    found += leaves(value, f"{name}.") if isinstance(value, ConfigDict) else [name]
  return found


if __name__ == "__main__":
  if not topologies.has_accelerator():  # To be said before recipes import jax.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  flags.mark_flags_as_required(["config", "workdir"])
  check_overrides(sys.argv[1:])
  app.run(main)
