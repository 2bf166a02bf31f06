"""Checks names, docstrings, comments, messages and pages.

CONTRIBUTING.md has the rules.

Run it without arguments for the whole project, or with files and folders:

  python tools/check_language.py vlmrlaif_jax/losses docs/running.md

It prints `file:line: finding` for each finding and exits with code 1 if there are any.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlmrlaif_jax"
FOLDERS = ("vlmrlaif_jax", "launch", "configs", "tools", "perf", "examples", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
# Words that our texts do without, and what to write in their place.
WORDS = {
  r"anew": "again",
  r"lest": "so that ... not",
  r"who(m)?ever": "the reader, or the user",
  r"thereof|whereof|wherein": "of which",
  r"in vain": "without effect",
  r"at once": "concurrently, or per batch",
  r"besides?": "next to, or in addition to",
  r"held against": "compared with",
  r"go(es)? on|went on": "continues, or resumes",
  r"tells?|told": "logs, reports, or returns",
  r"says?|said": "responds, states, or contains",
  r"hears?|heard": "receives",
  r"refus(es?|ed)": "rejects, or raises",
  r"wants?|wanted": "requires",
  r"knows? of|nobody|somebody": "the subject that acts",
  r"asked|is asking": "requested, queried, or prompted",
  r"what is worth": "the thing itself",
}
BANNED = {re.compile(rf"\b({word})\b", re.IGNORECASE): WORDS[word] for word in WORDS}
# Parts of names between underscores.
PARTS = {
  *("told", "asked", "said", "shown", "made", "found", "given", "heard", "laid"),
  *("fresh", "kept", "alike"),
}
HELD = re.compile(r"(^|_)held(?!_out)(_|$)")
FIRST_WORDS = {
  *("What", "Of", "Who", "Whose", "How", "Whether", "Which", "Where", "When", "Why"),
  *("As", "By", "From", "On", "In", "To", "With", "See"),
}
VERB = re.compile(r"[A-Z][a-z]+s")
PLURALS = {
  *("Arrays", "Bytes", "Blocks", "Columns", "Conversations", "Features", "Files"),
  *("Frames", "Groups", "Ids", "Keys", "Lines", "Logits", "Pairs", "Parameters"),
  *("Prompts", "Questions", "Responses", "Rewards", "Rows", "Seconds", "Tokens"),
  *("Variables", "Videos", "Weights", "Words", "This", "Always", "Values", "Examples"),
}
# Names that all modules of one kind define, because they are the kind's interface.
INTERFACES = {
  *("default_config", "check", "workload", "make", "make_job", "train", "STAGES"),
  *("load", "run", "SOURCE", "BENCHMARKS", "KEYS", "PROMPTS", "SETTINGS"),
  *("Model", "VARIANTS", "CONFIG", "SHARDING", "HF", "HF_VISION"),
  *(
    "LLM_VARIANTS",
    "ROPE_SECTIONS",
    "RENAMES",
    "MERGERS",
    "DECODER",
    "REQUIRED",
    "Mergers",
  ),
  *("DECODER", "TOP_CONFIG", "make_model"),
}


class Finding(NamedTuple):
  """A line to rewrite."""

  path: pathlib.Path
  line: int
  text: str


Findings: TypeAlias = Iterator[Finding]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main(arguments: Sequence[str]) -> int:
  """Prints all findings and returns the exit code."""
  roots = [pathlib.Path(name).resolve() for name in arguments]
  paths = list_files(roots or [ROOT / name for name in (*FOLDERS, *PAGES)])
  findings = [finding for path in paths for finding in check_file(path)]
  if not roots:
    findings += check_homonyms(PACKAGE)
  for path, line, text in findings:
    print(f"{path.relative_to(ROOT)}:{line}: {text}")
  print(f"{len(findings)} findings in {len(paths)} files", file=sys.stderr)
  return int(bool(findings))


def list_files(roots: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """Lists the Python and Markdown files of folders and files, in order."""
  paths = [
    path for root in roots for path in (root.rglob("*") if root.is_dir() else [root])
  ]
  return sorted(path for path in paths if path.suffix in (".py", ".md"))


def check_file(path: pathlib.Path) -> Findings:
  """Yields the findings of a file."""
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".md":
    yield from check_page(path, text)
    return
  tree = ast.parse(text)
  yield from check_docstrings(path, tree)
  yield from check_names(path, tree)
  yield from check_strings(path, tree)
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      yield from check_words(path, token.start[0], token.string)


def check_page(path: pathlib.Path, text: str) -> Findings:
  """Yields the banned words of a page, without its code."""
  is_code = False
  for number, line in enumerate(text.splitlines(), 1):
    if line.lstrip().startswith("```"):
      is_code = not is_code
    elif not is_code:
      yield from check_words(path, number, re.sub(r"`[^`]*`", "", line))


def check_words(path: pathlib.Path, line: int, text: str) -> Findings:
  """Yields the banned words of a text that starts at a line."""
  for pattern, instead in BANNED.items():
    for match in pattern.finditer(text):
      number = line + text.count("\n", 0, match.start())
      yield Finding(path, number, f"{match[0]!r}: write {instead}")


def check_docstrings(path: pathlib.Path, tree: ast.Module) -> Findings:
  """Yields docstrings that do not start as CONTRIBUTING.md has it."""
  for node in ast.walk(tree):
    if not isinstance(node, DOCUMENTED) or not (text := ast.get_docstring(node)):
      continue
    line = node.body[0].lineno
    yield from check_words(path, line, text)
    first = re.split(r"[\s,.:;]", text, maxsplit=1)[0]
    if first in FIRST_WORDS:
      yield Finding(path, line, f"docstring starts with {first!r}")
    elif is_plain_function(node) and (
      not VERB.fullmatch(first) or first in PLURALS or first.endswith("ss")
    ):
      yield Finding(path, line, f"docstring starts with {first!r}, not with a verb")


def is_plain_function(node: ast.AST) -> bool:
  """Returns whether a node is a function that is no property, fixture or builder."""
  if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
    return False
  decorators = {ast.unparse(each).rsplit(".", 1)[-1] for each in node.decorator_list}
  return not decorators & {"property", "cached_property"}


def check_names(path: pathlib.Path, tree: ast.Module) -> Findings:
  """Yields names that are defined here and contain a banned part."""
  for node in ast.walk(tree):
    name = get_defined_name(node)
    parts = PARTS.intersection(name.lower().split("_"))
    if parts or HELD.search(name):
      yield Finding(path, node.lineno, f"name {name!r}")


def get_defined_name(node: ast.AST) -> str:
  """Returns the name that a node defines, "" for others."""
  if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
    return node.name
  if isinstance(node, ast.arg):
    return node.arg
  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
    return node.id
  if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
    return node.attr
  return ""


def list_defined_names(statement: ast.stmt) -> list[str]:
  """Returns the names that a statement defines, without those within a block."""
  if isinstance(statement, ast.Assign):
    return [get_defined_name(target) for target in statement.targets]
  if isinstance(statement, ast.AnnAssign):
    return [get_defined_name(statement.target)]
  return [get_defined_name(statement)]


def check_strings(path: pathlib.Path, tree: ast.Module) -> Findings:
  """Yields the banned words of messages: what is raised, printed or logged."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.Raise | ast.Call):
      continue
    if isinstance(node, ast.Call) and not is_output(node.func):
      continue
    for part in ast.walk(node):
      if isinstance(part, ast.Constant) and isinstance(part.value, str):
        yield from check_words(path, part.lineno, part.value)


def is_output(function: ast.expr) -> bool:
  """Returns whether a call prints, logs or defines a flag."""
  name = ast.unparse(function)
  return name in ("print", "note", "log.note", "sys.exit") or "DEFINE_" in name


def check_homonyms(package: pathlib.Path) -> Findings:
  """Yields public names that several modules define."""
  places = defaultdict(list)
  for path in list_files([package]):
    if path.suffix == ".py":
      for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in list_defined_names(node):
          if name and not name.startswith("_") and name not in INTERFACES:
            places[name].append(Finding(path, node.lineno, f"name {name!r} again"))
  for findings in places.values():
    yield from findings[1:]


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
