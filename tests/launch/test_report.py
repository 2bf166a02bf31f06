"""The launcher of reports: a run, a stage, several runs."""

import importlib.util
import pathlib

import pytest

from tests.helpers.made_run import write_lines

PATH = pathlib.Path(__file__).parents[2] / "launch" / "report.py"


@pytest.fixture
def main():
  spec = importlib.util.spec_from_file_location("launch_report", PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main


@pytest.fixture
def runs(tmp_path):
  rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
  for name in ("a", "b"):
    write_lines(tmp_path / name / "ppo/metrics.jsonl", rows)
  return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_one_workdir_has_its_report_in_it(main, runs, capsys):
  main(runs[:1])
  said = capsys.readouterr().out.strip()
  assert said == f"{runs[0]}/report.html" and pathlib.Path(said).stat().st_size


def test_a_stage_has_its_own(main, runs, capsys):
  main([runs[0], "--stage=ppo"])
  assert capsys.readouterr().out.strip() == f"{runs[0]}/ppo/report.html"


def test_several_workdirs_are_compared(main, runs, tmp_path):
  out = tmp_path / "there" / "both.html"
  main([*runs, f"--out={out}"])
  assert "2 runs compared" in out.read_text()


def test_what_is_not_there_is_an_error_in_one_line(main, runs):
  with pytest.raises(SystemExit, match="error: no such folder: nowhere"):
    main(["nowhere"])
  with pytest.raises(SystemExit, match="has no stage 'dpo': it has ppo"):
    main([runs[0], "--stage=dpo"])


def test_a_stage_is_of_one_run(main, runs, capsys):
  with pytest.raises(SystemExit):
    main([*runs, "--stage=ppo"])
  assert "--stage works with one workdir" in capsys.readouterr().err
