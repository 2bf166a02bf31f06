"""tools/compare_labels.py: two ways to label, held against truth and each other."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def compare(tmp_path):
  def write(name, rows):
    folder = tmp_path / name / "label" / "blocks"
    folder.mkdir(parents=True)
    lines = [
      json.dumps({"id": f"p-{i}-0", "preference": preference, "mistakes": mistakes})
      for i, (preference, mistakes) in enumerate(rows)
    ]
    (folder / "block_00000.jsonl").write_text("\n".join(lines))

  def run(*pairs):
    command = [sys.executable, ROOT / "tools" / "compare_labels.py", *pairs]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

  write("a", [(1, [0, 1]), (2, [1, 0]), (None, [0, 1]), (1, [1, 1])])
  write("b", [(1, [0, 1]), (1, [1, 0]), (1, [0, 1]), (None, [1, 1])])
  write("c", [(1, [0, 1])])
  return run


def test_shares_are_of_the_pairs_that_are_kept_and_that_truth_can_tell(compare):
  lines = compare("a:b").stdout.splitlines()
  assert lines[0].startswith("A: 100.0 %") and lines[0].endswith("of 2 kept pairs")
  assert lines[1].startswith("B: 66.7 %") and lines[1].endswith("of 3 kept pairs")
  assert lines[2].startswith("A - B: 33.3 %")


def test_workdirs_of_other_prompts_are_refused(compare):
  assert "a:c have other prompts" in compare("a:c").stderr


def test_a_workdir_without_labels_is_named(compare):
  assert "no labels in none" in compare("a:none").stderr
