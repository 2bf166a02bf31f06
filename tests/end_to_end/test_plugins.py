"""The files that docs/extending.md shows, added to a copy of the package and run."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import several, small

ROOT = pathlib.Path(__file__).parents[2]
FILE = re.compile(
  r'^```python title="([\w/]+\.py)"\n(.*?)^```$', re.DOTALL | re.MULTILINE
)
STAGE, BENCHMARK = "unlikelihood", "pope"

pytestmark = pytest.mark.slow


def files_of_page():
  """The text of each file that the page shows, by its path."""
  return dict(FILE.findall((ROOT / "docs" / "extending.md").read_text()))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """The package, recipes, programs and measurements, and the files of the page."""
  root = tmp_path_factory.mktemp("copy")
  for name in ("vlmrlaif_jax", "configs", "launch", "perf"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, root / name, ignore=ignored)
  for path, text in files_of_page().items():
    assert not (root / path).exists()
    (root / path).write_text(text)
  return root


@pytest.fixture(scope="module")
def start(copy, tiny_settings, tiny_world):
  """Runs a program of the copy on the tiny world; returns what it printed."""
  shared = ("model", "data", "sft")
  front = {k: v for k, v in tiny_settings.items() if k.split(".")[0] in shared}
  front |= {"sft.short_steps": 1, "sft.long_steps": 1}
  settings = {
    "unlikelihood": {
      "stages": ("sft_short", "sft_long", STAGE),
      f"{STAGE}.preferences": tiny_world / "preferences.jsonl",
      f"{STAGE}.batch_size": 4,
      f"{STAGE}.steps": 3,
      f"{STAGE}.save_every": 1,
      f"{STAGE}.optimizer.warmup_steps": 0,
    },
    "benchmarks": {
      "stages": ("sft_short", "sft_long", "eval"),
      "evaluate.names": (BENCHMARK,),
      "evaluate.batch": 4,
    },
  }

  def run(program, recipe, *flags):
    line = [sys.executable, f"launch/{program}.py", f"--config=configs/{recipe}.py"]
    line += small.flags(front | settings[recipe])
    path = os.pathsep.join(map(str, (copy, several.WITHOUT_TORCH)))
    env = several.environment(4, PYTHONPATH=path)
    done = subprocess.run(
      [*line, *flags], cwd=copy, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

  return run


@pytest.fixture(scope="module")
def workdir(start, copy):
  """A workdir that the stage has trained in, and the benchmark has measured."""
  for recipe in ("unlikelihood", "benchmarks"):
    start("run", recipe, f"--workdir={copy / 'run'}")
  return copy / "run"


def test_the_page_shows_a_method_a_stage_a_recipe_and_a_benchmark():
  assert {path.rpartition("/")[0] for path in files_of_page()} == {
    "vlmrlaif_jax/methods",
    "vlmrlaif_jax/stages/training",
    "configs",
    "vlmrlaif_jax/evals/benchmarks",
  }


def test_the_stage_trains_with_the_method(workdir):
  rows = [json.loads(line) for line in open(workdir / STAGE / "metrics.jsonl")]
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert rows[-1]["loss"] < rows[0]["loss"] and "rejected_nll" in rows[0]


def test_the_benchmark_measures_the_new_policy_next_to_sft(workdir):
  found = json.loads((workdir / "eval" / "results.json").read_text())[BENCHMARK]
  assert found["pair"] == ["sft", STAGE]
  assert found["counts"][STAGE]["cases"] == 2 * small.VIDEOS["benchmark"]


def test_the_report_shows_the_stage_and_the_scores(workdir):
  page = (workdir / "report.html").read_text()
  assert "Unlikelihood training" in page
  scores = json.loads(
    (workdir / "eval" / BENCHMARK / STAGE / "scores.json").read_text()
  )
  assert BENCHMARK in page and f"{scores['scores']['accuracy']['mean']:.3f}" in page


def test_the_stage_is_skipped_when_it_is_done(workdir, start):
  assert f"{STAGE}: already done, skipped" in start(
    "run", "unlikelihood", f"--workdir={workdir}"
  )


def test_the_stage_is_planned(start, copy):
  rows = copy / "plan.json"
  flags = (f"--stage={STAGE}", f"--json={rows}", f"--cache={copy / 'cache'}")
  start("plan", "unlikelihood", "--topology=cpu-1", *flags)
  (planned,) = json.loads(rows.read_text())
  assert planned["stage"] == STAGE and planned["step_s"] > 0
