"""The documentation against the code: links, names, settings, errors and snippets.

A page says `losses/advantages.py::compute_gae` for a function and
`tests/losses/test_advantages.py::test_gae_by_hand` for a test. A snippet under
`<!-- runnable -->` is run.
"""

import ast
import functools
import importlib
import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from ml_collections import ConfigDict

from tools.draw_packages import TIER

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
  *sorted(DOCS.rglob("*.md")),
]
STAGES = sorted((DOCS / "stages").glob("*.md"))
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
NO_RECIPES = ("__init__", "front", "prices", "published")
NOT_OURS = {"model.generate"}  # Of transformers.
FILES = ("py", "json", "jsonl", "npy", "md")

FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
NAMED = re.compile(r"([\w./-]+\.py)::(\w+)")
SETTING = re.compile(r"--config\.([a-z_0-9.]*[a-z_0-9])")
RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
SNIPPETS = [
  pytest.param(code, id=f"{page.stem}-{number}")
  for page in PAGES
  for number, code in enumerate(RUNNABLE.findall(page.read_text()), 1)
]

of_pages = pytest.mark.parametrize(
  "page", PAGES, ids=lambda p: str(p.relative_to(ROOT))
)


def prose(page):
  """A page without its blocks of code, and without HTML comments."""
  text = FENCE.sub("", page.read_text())
  return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(page):
  """What a link can point to: headings, written as GitHub and mkdocs both do."""
  found = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
  plain = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in found)
  return {re.sub(r"\s", "-", heading) for heading in plain}


def place(name):
  """A file of the repository by the name that pages give it; None if it is not."""
  there = (ROOT / name, ROOT / "vlmrlaif_jax" / name)
  return next((path for path in there if path.exists()), None)


@functools.cache
def defined(path):
  """What a file defines at its top: functions, classes, constants."""
  names = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.Assign):
      names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    elif isinstance(node, ast.AnnAssign):
      names.add(node.target.id)
  return names


@functools.cache
def settings():
  """Every key of every recipe, sections and leaves: "ppo" and "ppo.kl_coef"."""
  keys = set()

  def add(config, at):
    for key, value in config.items():
      keys.add(at + key)
      if isinstance(value, ConfigDict):
        add(value, f"{at}{key}.")

  for name in set(RECIPES) - set(NO_RECIPES):
    add(importlib.import_module(f"configs.{name}").get_config(), "")
  return keys


@functools.cache
def said():
  """Every piece of text in the code, of which errors are made."""
  folders = ("vlmrlaif_jax", "launch", "configs")
  files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
  nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
  texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
  scripts = [path.read_text() for path in (ROOT / "launch").rglob("*.sh")]
  return "\0".join([*scripts, *(text for text in texts if isinstance(text, str))])


WALKED = re.compile(r"^\| \d+ \| `([\w/]+\.py)` \| ([^|]+) \|", re.MULTILINE)


@pytest.mark.parametrize(
  ("heading", "longest"),
  [("One video, from disk to an update", 14), ("One setting, from the recipe", 8)],
)
def test_a_walk_is_short_and_names_functions_that_there_are(heading, longest):
  text = (DOCS / "design.md").read_text()
  walk = text[text.index(f"## {heading}") :].split("\n## ")[0]
  steps = WALKED.findall(walk)
  assert 5 < len(steps) <= longest and f"passes {len(steps)} modules" in walk
  for module, names in steps:
    code = place(module).read_text()
    for name in SPAN.findall(names):
      kind, *method = name.split(".")
      assert kind in defined(place(module)), f"{module}: {kind}"
      assert all(f"  def {each}(" in code for each in method), f"{module}: {name}"


@of_pages
def test_links_lead_to_files_and_headings_that_there_are(page):
  broken = []
  for link in LINK.findall(SPAN.sub("", prose(page))):
    if re.match(r"\w+:", link):
      continue
    file, _, anchor = link.partition("#")
    target = (page.parent / file) if file else page
    if not target.exists() or (anchor and anchor not in anchors(target)):
      broken.append(link)
  assert not broken


@of_pages
def test_files_that_are_named_exist(page):
  spans = "\n".join(SPAN.findall(prose(page)))
  named = re.findall(r"^[\w./-]+/[\w.-]+\.(?:py|md|sh|yaml|sbatch)\b", spans, re.M)
  assert not [n for n in named if place(n) is None and not n.endswith("NAME.py")]


@of_pages
def test_functions_and_tests_that_are_named_exist(page):
  lost = [
    f"{file}::{name}"
    for file, name in NAMED.findall(page.read_text())
    if place(file) is None or name not in defined(place(file))
  ]
  assert not lost


@pytest.mark.parametrize("page", STAGES, ids=lambda p: p.stem)
def test_a_stage_page_has_formulas_functions_and_tests(page):
  text = page.read_text()
  files = [file for file, _ in NAMED.findall(text)]
  assert "$" in text
  assert any(file.startswith("tests/") for file in files)
  assert any(not file.startswith("tests/") for file in files)


@of_pages
def test_settings_that_are_given_are_of_a_recipe(page):
  assert not set(SETTING.findall(page.read_text())) - settings()


@of_pages
def test_settings_that_are_spoken_of_are_of_a_recipe(page):
  sections = {key.partition(".")[0] for key in settings() if "." in key}
  lost = []
  for span in SPAN.findall(prose(page)):
    found = re.match(r"(?:config\.)?(([a-z_]+)\.[a-z_][a-z_.]*)(?==|$)", span)
    if not found or found[2] not in sections or found[1] in settings() | NOT_OURS:
      continue
    module, name = found[1].split(
      ".", 1
    )  # `label.asking` is a function of stages/labeling/pairwise.py.
    path = place(f"{module}.py")
    if name not in FILES and (path is None or name not in defined(path)):
      lost.append(span)
  assert not lost


def test_errors_in_troubleshooting_are_errors_of_the_code():
  text = (DOCS / "troubleshooting.md").read_text().split("## No error")[0]
  quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
  lost = [q for q in quoted if not all(part in said() for part in q.split("…"))]
  assert len(quoted) >= 30 and not lost


def test_every_page_is_in_the_navigation_once():
  nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
  there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
  there |= {f"api/{package}.md" for package in TIER}  # docs/hooks/api.py makes them.
  assert sorted(re.findall(r"[\w/-]+\.md", str(nav))) == sorted(there)


@pytest.mark.parametrize("code", SNIPPETS)
def test_runnable_snippets_run(code):
  exec(compile(code, "snippet", "exec"), {})


def test_shell_blocks_are_shell():
  texts = [page.read_text() for page in PAGES]
  blocks = [b for text in texts for b in re.findall(r"```bash\n(.*?)```", text, re.S)]
  run = functools.partial(
    subprocess.run, ["bash", "-n"], text=True, capture_output=True
  )
  assert not [told for block in blocks if (told := run(input=block).stderr)]


def test_readme_leads_to_everything_in_one_click():
  links = set(LINK.findall((ROOT / "README.md").read_text()))
  assert {
    "docs/results.md",
    "docs/design.md#the-picture",
    "docs/quickstart.md",
  } <= links  # The commands stand there.


@pytest.mark.slow  # It imports every module of the API reference.
def test_site_is_built_without_a_warning(tmp_path):
  line = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path]
  built = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
  assert built.returncode == 0, built.stderr
  assert (tmp_path / "stages" / "ppo.html").exists()
  assert "clipped_policy_loss" in (tmp_path / "api" / "losses.html").read_text()
