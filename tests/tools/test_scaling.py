import json
import subprocess

import pytest

from tools import scaling
from tools.scaling_points import list_points


def test_a_compiled_row_stands_before_an_estimate(tmp_path):
  first, second = list_points()[:2]
  (tmp_path / "estimates").mkdir()
  for name in (first.name, second.name):
    (tmp_path / "estimates" / f"{name}.json").write_text(json.dumps([{"of": "shapes"}]))
  (tmp_path / f"{first.name}.json").write_text(json.dumps([{"of": "compiler"}]))
  assert scaling.read_rows(tmp_path) == {
    first.name: {"of": "compiler"},
    second.name: {"of": "shapes"},
  }


@pytest.mark.parametrize(
  "code, told", [(0, "fits"), (3, "does not fit"), (1, "FAILED")]
)
def test_each_point_is_run_and_told_of(tmp_path, monkeypatch, capsys, code, told):
  lines, written = [], []

  def run(line, **given):
    lines.append(line)
    return subprocess.CompletedProcess(line, code)

  monkeypatch.setattr(subprocess, "run", run)
  scaling.compile_all(list_points()[:2], tmp_path, lambda: written.append(len(lines)))
  assert written == [1, 2]  # The document, after each.
  assert f"--json={tmp_path}/{list_points()[1].name}.json" in lines[1]
  assert "--topology=v5e-64" in lines[0] and "--sweep" in lines[0]
  assert capsys.readouterr().out.count(told) == 2
