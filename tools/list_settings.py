"""Writes the tables of all settings into docs/settings.md.

python -m tools.list_settings

Defaults come from the `default_config` of each section, meanings from its comments, and
allowed values from the errors of the validation.
"""

import ast
import functools
import importlib
import inspect
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import front, rlaif_v
from perf.pages import replace_block
from tools.check_language import list_defined_names
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import flatten_settings
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.terms import scorer
from vlmrlaif_jax.recipes import validation
from vlmrlaif_jax.runtime import run
from vlmrlaif_jax.stages.stage import get_stage, load_stages
from vlmrlaif_jax.stages.training import oracles, rollout_settings
from vlmrlaif_jax.training import alarms, update

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"
NAME = "settings, written by tools/list_settings.py"
NO_RECIPES = ("__init__", "front", "prices", "pretrain", "published")
PRESETS = ("tiny", "7b")
COLUMNS = ("setting", "type", "default", *PRESETS, "allowed values", "meaning")
# Subsections of several sections, each with a table of its own.
SHARED: dict[str, Callable[[], ConfigDict]] = {
  "optimizer": update.default_config,
  "oracle": oracles.default_config,
  "endpoint": endpoint.default_config,
  "alarms": alarms.default_config,
  "rollout": rollout_settings.default_config,
}
IN_SHARED = re.compile(rf"(?:.*\.)?({'|'.join(SHARED)})\.(.+)")
# Calls of functions that return settings.
BUILDER = re.compile(r"\w+\.(default_config|get_\w+_(config|settings))")
# Values that the validation rejects, by the type of the setting.
NONSENSE = {str: "nonsense", tuple: ("nonsense",), int: -(10**9), float: -1e9}
MAX_VALUES = 3  # Largest number of values in a cell.
MAX_LENGTH = 60  # Largest number of characters of a value in a cell.


class Settings(NamedTuple):
  """The settings of one table."""

  prefix: str  # Prefix of the names in flags, such as "ppo.".
  defaults: Mapping[str, Any]  # Defaults by name without prefix; None: required.
  comments: Mapping[str, str]  # Comments by name without prefix.


def main() -> None:
  """Replaces the tables on the page."""
  PAGE.write_text(insert_tables(PAGE.read_text()))


def insert_tables(page: str) -> str:
  """Returns the page with all tables in their block."""
  return replace_block(page, NAME, "\n" + "\n\n".join(list_blocks()) + "\n")


def list_blocks() -> Iterator[str]:
  """Yields the headings, sentences and tables of the page."""
  names = dict.fromkeys(("stages", "rounds", "seed", "recipe", "preset"))
  comments = read_comments(rlaif_v, "tiny") | read_comments(front, "make_recipe")
  yield "## Top level"
  yield make_table(list_rows(Settings("", names | {"seed": 0}, comments)))
  mesh = front.make_recipe("", (), model={}, data={}).mesh.to_dict()
  texts = {
    key.removeprefix("mesh."): text for key, text in comments.items() if "mesh." in key
  }
  yield "## `mesh`\n\nRead by all stages."
  yield make_table(list_rows(Settings("mesh.", mesh, texts)))
  for section, settings in list_sections().items():
    yield f"## `{section}`\n\nRead by {describe_readers(section)}."
    yield make_table(list_rows(settings))
  yield "### Benchmarks of `evaluate`\n\nEach benchmark has a subsection of its name."
  yield make_table(list_benchmark_rows(), "benchmarks")
  for name, builder in SHARED.items():
    places = [place for place in list_subsections() if place.split(".")[-1] == name]
    yield f"## `{name}`\n\nA part of {format_code(places)}."
    if name == "endpoint":
      yield "The defaults are the values of the section [`judge`](#judge)."
      continue
    rows = list_rows(read_builder(f"{places[0]}.", builder))
    yield make_table([[*row[:3], "", "", *row[5:]] for row in rows])


# Sections.


@functools.cache
def load_recipes(preset: str) -> list[ConfigDict]:
  """Returns all recipes of configs/ with a preset."""
  names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
  modules = [importlib.import_module(f"configs.{name}") for name in names]
  return [
    module.get_config(preset)
    for name, module in zip(names, modules, strict=True)
    if name not in NO_RECIPES
  ]


@functools.cache
def list_values(preset: str) -> dict[str, list[Any]]:
  """Returns the different values of each setting in all recipes with a preset."""
  values: dict[str, list[Any]] = {}
  for recipe in load_recipes(preset):
    for key, value in flatten_settings(recipe.to_dict()).items():
      if value not in values.setdefault(key, []):
        values[key].append(value)
  return values


def list_subsections() -> list[str]:
  """Returns the dotted names of all sections and subsections."""
  keys = (key.rpartition(".")[0] for key in list_values("tiny"))
  return list(dict.fromkeys(keys))


def list_sections() -> dict[str, Settings]:
  """Returns the settings of each section, without benchmarks."""
  builders = {"model": run.default_config, "data": pipeline.default_config}
  for stage in load_stages().values():
    module = vars(sys.modules[stage.run.__module__])
    own = module.get(f"get_{stage.section}_config") or module["default_config"]
    builders[stage.section] = own
  builders["reward"] = scorer.default_config
  builders["judge"] = endpoint.default_config
  return {name: read_builder(f"{name}.", make) for name, make in builders.items()}


def read_builder(prefix: str, builder: Callable[[], ConfigDict]) -> Settings:
  """Returns the settings that a function builds, with the comments in its code."""
  comments = read_comments(sys.modules[builder.__module__], builder.__name__)
  return Settings(prefix, flatten_settings(builder().to_dict()), comments)


def describe_readers(section: str) -> str:
  """Returns the stages that read a section: its own, and others of some recipes."""
  if section in ("model", "data"):
    return "all stages"
  if section == "reward":
    return "`ppo`; by `grpo`, if its oracle is the reward; by `eval`, if it is there"
  if section == "judge":
    return "all stages whose judge is a server; a subsection `endpoint` overrides it"
  own = {stage.name for stage in load_stages().values() if stage.section == section}
  others = {
    stage.name
    for recipe in load_recipes("tiny")
    for stage in map(get_stage, validation.list_stages(recipe))
    if section in stage.reads(recipe)
  }
  also = f"; in some recipes also by {format_code(sorted(others))}" if others else ""
  return format_code(sorted(own)) + also


# Rows.


def make_table(rows: list[list[str]], *columns: str) -> str:
  """Returns a table of rows, without columns that are empty in all rows."""
  names = (*COLUMNS, *columns)
  used = [i for i in range(len(names)) if any(row[i] for row in rows)]
  return markdown_table(
    ([row[i].replace("|", r"\|") for i in used] for row in rows),
    [names[i] for i in used],
  )


def list_rows(settings: Settings) -> list[list[str]]:
  """Returns the rows of a section, without benchmarks.

  Settings of shared subsections are rows only if the section or a recipe changes them.
  """
  rows = []
  for name, default in settings.defaults.items():
    row = make_row(settings, name)
    if shared := IN_SHARED.fullmatch(name):
      original = read_builder("", SHARED[shared[1]])
      if original.defaults[shared[2]] == default and not any(row[3:5]):
        continue
      row[-1] = original.comments.get(shared[2], "")
    if name.split(".")[0] not in protocol.load_benchmarks():
      rows.append(row)
  return rows


def list_benchmark_rows() -> list[list[str]]:
  """Returns a row for the settings that are equal in several benchmarks."""
  names: dict[tuple[str, ...], list[str]] = {}
  for benchmark in protocol.load_benchmarks().values():
    comments = read_comments(protocol, "Benchmark")
    comments |= read_comments(sys.modules[benchmark.run.__module__], "SETTINGS")
    defaults = benchmark.default_config().to_dict()
    settings = Settings(f"evaluate.{benchmark.name}.", defaults, comments)
    for name in defaults:
      names.setdefault(tuple(make_row(settings, name)), []).append(benchmark.name)
  return [[*row, format_benchmarks(each)] for row, each in sorted(names.items())]


def format_benchmarks(names: list[str]) -> str:
  """Returns names as code; of most benchmarks, those that are missing."""
  missing = [name for name in protocol.load_benchmarks() if name not in names]
  if len(missing) < len(names):
    return f"all but {format_code(missing)}"
  return format_code(names)


def make_row(settings: Settings, name: str) -> list[str]:
  """Returns the cells of a setting by COLUMNS."""
  key, default = settings.prefix + name, settings.defaults[name]
  recipes = [list_values(preset).get(key, []) for preset in PRESETS]
  changed = ["" if each == [default] else format_values(each) for each in recipes]
  example = next((value for value in recipes[0]), default)
  comments = settings.comments
  meaning = comments.get(name) or comments.get(name.rpartition(".")[0], "")
  initial = "required" if default is None else format_values([default])
  allowed = find_allowed(key, type(example))
  return [f"`{name}`", type(example).__name__, initial, *changed, allowed, meaning]


def format_values(values: list[Any]) -> str:
  """Returns values as code, with quotes around strings; "by recipe" for many."""
  texts = [repr(value).replace("'", '"') for value in values]
  is_long = len(texts) > MAX_VALUES or max(map(len, texts), default=0) > MAX_LENGTH
  return "by recipe" if is_long else format_code(texts)


def format_code(texts: Iterable[str]) -> str:
  """Returns texts as code, with commas."""
  return ", ".join(f"`{text}`" for text in texts)


@functools.cache
def find_allowed(key: str, kind: type) -> str:
  """Returns the values that the validation allows, "" if it allows all.

  Validates each recipe that has the setting with a wrong value, and parses the error.
  """
  required = re.compile(
    rf"--config\.{re.escape(key)}(?![\w.])\S* must be (.+?)"
    r"(?:[,;:.]? (?:not|got) |[.;:] |$)",
    re.MULTILINE,
  )
  for recipe in load_recipes("tiny") if kind in NONSENSE else ():
    changed = recipe.copy_and_resolve_references()
    if key not in flatten_settings(changed.to_dict()):
      continue
    changed.update_from_flattened_dict({key: NONSENSE[kind]})
    try:
      validation.check_recipe(changed)
    except UserError as error:
      if match := required.search(str(error)):
        return format_allowed(match[1])
  return ""


def format_allowed(text: str) -> str:
  """Returns the requirement in an error message, with choices as code."""
  choices = re.fullmatch(r"(?:one of|some of|of) [\[(]?(.*?)[\])]?", text)
  if not choices:
    return re.sub(r"\bthe \d+ ", "the number of ", text)
  values = (value.strip("'\"") for value in choices[1].split(", "))
  return format_code(value or '""' for value in values)


# Comments.


def read_comments(module: ModuleType, name: str) -> dict[str, str]:
  """Returns the comments of settings in the code of a module.

  Args:
    module: Contains the code.
    name: A function, class or constant at the top of the module. Functions that it
      calls and that return settings are read, too.
  """
  source = inspect.getsource(module)
  tops = [node for node in ast.parse(source).body if name in list_defined_names(node)]
  nodes = [node for top in tops for node in ast.walk(top)]
  lines = read_comment_lines(source)
  comments: dict[str, str] = {}
  for node in nodes:
    for key, line in list_keys(node):
      comments[key] = comments.get(key) or lines[line]
  for node in nodes:
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    owner = vars(module).get(called.partition(".")[0])
    if BUILDER.fullmatch(called) and owner:
      function = vars(owner)[called.partition(".")[2]]
      if function not in SHARED.values():
        called_module = sys.modules[function.__module__]
        own = {key: text for key, text in comments.items() if text}
        comments = read_comments(called_module, function.__name__) | own
  return comments


def list_keys(node: ast.AST) -> Iterator[tuple[str, int]]:
  """Yields the settings that a node sets, with their lines."""
  if isinstance(node, ast.keyword) and node.arg:
    yield node.arg, node.lineno
    for part in node.value.keywords if isinstance(node.value, ast.Call) else ():
      yield f"{node.arg}.{part.arg}", part.lineno
  elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
    yield node.attr, node.lineno
  elif isinstance(node, ast.Dict):
    for key in node.keys:
      if isinstance(key, ast.Constant):
        yield str(key.value), key.lineno


def read_comment_lines(source: str) -> dict[int, str]:
  """Returns the comment of each line: at its end, or in the lines above it."""
  tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
  texts = {t.start[0]: t.string[2:] for t in tokens if t.type == tokenize.COMMENT}
  comments: dict[int, str] = {}
  above: list[str] = []
  for number, line in enumerate(source.splitlines(), 1):
    if line.lstrip().startswith("#"):
      above.append(texts[number])
    else:
      comments[number] = texts.get(number) or " ".join(above)
      above = []
  return comments


if __name__ == "__main__":
  main()
