"""Which layer may import which: the one picture of the project, as a test.

    programs -> loop, methods, feedback, evals -> generate -> the bottom row -> types

An arrow is an import and points down. A layer is a file or a folder right under
vlmrlaif_jax/; report.py and its parts (report_*.py) are one, as all of WITH_PARTS.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "vlmrlaif_jax"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.stat().st_size)

MAY_IMPORT = {  # Layer -> layers.
  "types": set(),
  # The bottom row: siblings that do not know each other.
  "losses": {"losses"},
  "models": {"models", "types"},
  "data": {"data", "types", "ahead"},
  "sharding": {"types"},
  "update": {"types"},
  # Which rows and decisions are whose, where there are several processes.
  "hosts": {"sharding"},
  "checkpoint": {"hosts", "types"},
  "log": set(),
  "ahead": set(),
  "phases": set(),
  "watch": set(),
  "alarms": set(),
  "free": set(),
  "raised": {"alarms", "log"},
  "topologies": set(),
  # Checkpoints: files, names, adapters, layouts.
  "tensors": set(),
  "tables": {"tensors", "types"},
  "adapters": {"models", "tensors"},
  "layouts": {"adapters", "models", "tensors"},
  # What is sampled; then what to learn from, who judges, what to measure, the loop.
  "draw": set(),
  "slots": {"draw", "models", "types"},
  "refill": {"models", "slots", "types"},
  "generate": {"losses", "models", "refill", "slots", "types"},
  "methods": {"losses", "generate", "types"},
  "feedback": {"feedback", "generate", "data", "hosts", "types"},
  "evals": {"evals", "feedback", "generate", "data", "hosts", "types"},
  "loop": {
    *("checkpoint", "hosts", "update", "sharding", "log", "types"),
    *("ahead", "phases", "watch", "alarms", "raised"),
  },
}
# They see everything; those of the last line are what they have in common.
PROGRAMS = {
  *(
    "train",
    "rl",
    "dpo",
    "divide",
    "pretrain",
    "label",
    "evaluate",
    "convert",
    "plan",
    "report",
    "recipe",
    "checks",
    "judges",
    "judge_cases",
    "judge_scores",
    "measure_judges",
  ),
  *("abilities", "benchmarks", "export", "card", "bench", "chat"),
  *(
    "build",
    "roles",
    "answer",
    "scoring",
    "oracles",
    "yes_no",
    "best_of",
    "rounds",
  ),
  *("packed", "counts", "choose", "encoding", "clip_likeness", "samples", "study"),
}
WITH_PARTS = ("report", "bench", "plan", "benchmarks", "convert", "study", "chat")
MUST_NOT_IMPORT = {  # Layer -> libraries.
  "losses": {"flax", "optax", "ml_collections"},
  "models": {"optax", "ml_collections"},
  "data": {"jax", "flax", "optax"},
}


def layer_of(path):
  name = path.relative_to(ROOT).parts[0].removesuffix(".py")
  return next((p for p in WITH_PARTS if name.startswith(f"{p}_")), name)


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


def in_picture(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=in_picture)
def test_imports_point_downwards(path):
  layer = layer_of(path)
  if layer not in PROGRAMS:
    assert layer in MAY_IMPORT, f"{layer} has no place in the picture: give it one"
    imported = {layer_of(f) for name in imports_of(path) for f in files_of(name)}
    assert imported <= MAY_IMPORT[layer]


@pytest.mark.parametrize("layer", MUST_NOT_IMPORT)
def test_a_layer_does_not_know_what_is_not_its_business(layer):
  for path in FILES:
    if layer_of(path) == layer:
      assert not libraries_of(path) & MUST_NOT_IMPORT[layer], in_picture(path)


def test_only_checkpoint_knows_orbax():
  knowing = [in_picture(path) for path in FILES if "orbax" in libraries_of(path)]
  assert knowing == ["checkpoint.py"]


def test_report_needs_no_jax():
  for path in all_files_behind(ROOT / "report.py"):
    assert "jax" not in libraries_of(path), f"report imports {in_picture(path)}"


def test_the_rule_sees_through_every_way_to_import(tmp_path):
  file = tmp_path / "x.py"
  file.write_text(
    "from vlmrlaif_jax import types\n"
    "def f():\n  import vlmrlaif_jax.losses.masked as m\n"
    "from vlmrlaif_jax.models.layers import Dense\n"
  )
  found = {layer_of(f) for name in imports_of(file) for f in files_of(name)}
  assert found == {"types", "losses", "models"}
