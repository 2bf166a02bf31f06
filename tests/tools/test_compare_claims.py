"""tools/compare_claims.py: two ways to score answers, held against truth."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def compare(tmp_path):
  def write(name, *prompts):
    for part in ("world", "claims_1"):
      (tmp_path / name / part).mkdir(parents=True)
    asked = [
      {"id": f"p-{i}-0", "truth": {"kind": kind}}
      for i, (kind, *_) in enumerate(prompts)
    ]
    rows = [
      {"id": f"p-{i}-0", "answers": answers, "scores": scores, "mistakes": mistakes,
       "unsupported": [max(m - 1, 0) for m in mistakes]}
      for i, (_, answers, scores, mistakes) in enumerate(prompts)
    ]  # fmt: skip
    lines = lambda rows: "\n".join(json.dumps(row) for row in rows) + "\n"
    (tmp_path / name / "world" / "prompts.jsonl").write_text(lines(asked))
    told = lines([{"fingerprint": "x"}, *rows])
    (tmp_path / name / "claims_1" / "answers.jsonl").write_text(told)

  write("a", ("description", list("xyz"), [0, -1, -2], [0, 1, 2]),
        ("motion", list("xy"), [0, -1], [1, 0]))  # fmt: skip
  write("b", ("description", list("xyz"), [-1, 0, None], [0, 1, 2]),
        ("motion", list("xy"), [-1, 0], [1, 0]))  # fmt: skip
  write("c", ("description", list("xyw"), [0, 0, 0], [0, 1, 2]))

  def run(*given):
    command = [sys.executable, ROOT / "tools" / "compare_claims.py", *given]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

  return run


def test_pairs_are_those_that_scores_and_truth_order(compare):
  _, _, *lines = compare("a:b").stdout.splitlines()
  cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in lines}
  first, second, change = cells["| descriptions", "mistakes"]
  assert first.startswith("100.0 %") and first.endswith("of 3")
  assert second.startswith("0.0 %") and second.endswith("of 1")
  assert change.startswith("100.0")
  # x and y say nothing wrong; only z does, and of that B has no score.
  assert cells["| descriptions", "unsupported"][0] == "too few pairs"
  first, second, _ = cells["| short answers", "mistakes"]
  assert first.startswith("0.0 %") and second.startswith("100.0 %")


def test_workdirs_of_other_answers_are_refused(compare):
  assert "a:c hold other answers" in compare("a:c").stderr


def test_a_workdir_without_claims_is_named(compare):
  assert "no none/claims_1/answers.jsonl" in compare("a:none").stderr
