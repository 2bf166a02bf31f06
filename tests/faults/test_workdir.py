"""Damaged files of a workdir, and the next start; the cases are in catalog.py."""

import json
import pathlib
import shutil

import pytest

from tests.faults import catalog, damage, pipeline, tried
from vlmrlaif_jax.recipes import machine_faults, runner, workdir_lock


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The workdir of a run that was left alone."""
  root = tmp_path_factory.mktemp("faults") / "run"
  with pytest.MonkeyPatch.context() as patch:
    pipeline.install(patch)
    runner.run_recipe(pipeline.config(), str(root))
  return root


@pytest.fixture
def copy(whole, monkeypatch):
  """The workdir at the same path, restored after the test."""
  pipeline.install(monkeypatch)
  saved = whole.with_name("saved")
  shutil.copytree(whole, saved)
  yield whole
  shutil.rmtree(whole)
  saved.rename(whole)


def start(root):
  """Runs the recipe; returns (exit code, message) as the program has them."""
  try:
    runner.run_recipe(pipeline.config(), str(root))
  except Exception as error:
    failure = machine_faults.describe_failure(error, root)
    if failure is None:
      raise
    return failure[::-1]
  return 0, ""


@pytest.mark.parametrize("case", catalog.WORKDIR, ids=lambda case: case.fault)
def test_the_next_start_repairs_or_names_what_is_damaged(copy, case, capsys):
  before = pipeline.read_results(copy)
  case.damage(copy / case.file)
  capsys.readouterr()
  code, message = start(copy)
  said = capsys.readouterr().out + message
  assert code == case.code, said
  assert case.seen in said and "Traceback" not in said
  if code:
    assert str(copy / case.file) in message
    return
  after = pipeline.read_results(copy)
  differ = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
  assert differ == set(case.changed)


def test_a_damaged_checkpoint_of_an_earlier_stage_is_named_with_its_remedy(
  whole, tmp_path
):
  shutil.copytree(whole / "rm", tmp_path / "rm")
  folder = tmp_path / "rm" / "checkpoints" / "3"
  damage.remove_data(folder)
  with pytest.raises(Exception, match=f"{folder} is damaged.*done.json") as failed:
    pipeline.read_params(folder)
  _, code = machine_faults.describe_failure(failed.value, tmp_path)
  assert code == 2


def test_a_removed_workdir_ends_the_run_without_results(tmp_path, monkeypatch):
  def evaluate(run, stage, folder, log):
    shutil.rmtree(tmp_path / "run")
    (folder / "sub").mkdir(parents=True)
    return pipeline.evaluate(
      run._replace(watch=runner.StageMonitor()), stage, folder, log
    )

  pipeline.install(monkeypatch, {**pipeline.PARTS, "eval": evaluate})
  code, message = start(tmp_path / "run")
  assert code == 2 and "was removed during the run" in message
  assert not (tmp_path / "run" / "eval" / "done.json").exists()
  assert not (tmp_path / "run" / "report.html").exists()


def test_a_run_that_lost_its_workdir_to_another_stops(tmp_path, monkeypatch):
  def train(run, stage, folder, log):
    path = tmp_path / "run" / workdir_lock.LOCK_FILE
    holder = workdir_lock.read_holder(path)
    path.write_text(json.dumps(holder._replace(token="x", host="elsewhere")._asdict()))
    return pipeline.train(run, stage, folder, log)

  parts = {**pipeline.PARTS, "sft_long": train}
  pipeline.install(monkeypatch, parts)
  code, message = start(tmp_path / "run")
  assert code == 2 and "elsewhere has taken over" in message
  assert not (tmp_path / "run" / "sft_long" / "done.json").exists()


def test_every_fault_has_its_test():
  for case in tried.OTHERS:
    file, name = case.test.split("::")
    path = pathlib.Path(__file__).parents[1] / file
    assert f"def {name}(" in path.read_text(), case.test
