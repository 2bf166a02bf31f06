"""Which stages run, in what order, and in which workdir."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.helpers import small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import TrainState
from vlmrlaif_jax.data.pipeline import Splits
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.report.files import list_report_stages, read_stage_facts
from vlmrlaif_jax.stages.stage import format_title, get_stage, write_facts
from vlmrlaif_jax.training import checkpoint

ALL = ("sft_short", "sft_long", "label", "rm", "ppo", "eval")


def config(stages=ALL, **settings):
  return small.config({"data.prompt_len": 64}, stages, **settings)


@pytest.fixture
def ran(monkeypatch):
  """Replaces stages; returns (calls of loading.create_run, names of run stages)."""
  builds, stages = [], []

  def make(config, workdir, watch):
    builds.append(workdir)
    nothing = [None] * (len(runner.Run._fields) - 2)
    return runner.Run(config, workdir, *nothing)._replace(splits=Splits())

  def note(run, stage, folder, log):
    stages.append(stage)
    return {"rows": 3}

  made = lambda name: get_stage(name)._replace(
    run=note, steps="", total_steps=lambda run: 1
  )
  monkeypatch.setattr(runner, "get_stage", made)
  monkeypatch.setattr(runner.loading, "create_run", make)
  monkeypatch.setattr(runner.page, "write_report", lambda root: root / "report.html")
  return builds, stages


# Stages.


def test_stages_run_in_order_and_leave_what_they_did(tmp_path, ran):
  builds, stages = ran
  runner.run_recipe(config(), str(tmp_path))
  assert stages == list(ALL)
  assert builds == [tmp_path]  # Models and data are made once for all of them.
  for stage in ALL:
    done = json.loads((tmp_path / stage / "done.json").read_text())
    assert done["summary"] == {"rows": 3} and done["seconds"] >= 0


def test_a_cache_of_compiled_programs_that_is_set_stays(tmp_path, ran):
  before = jax.config.jax_compilation_cache_dir
  runner.run_recipe(config(), str(tmp_path))
  assert before and jax.config.jax_compilation_cache_dir == before


def test_a_report_finds_the_stages_as_they_are_declared(tmp_path, ran):
  runner.run_recipe(config(), str(tmp_path))
  assert list_report_stages(tmp_path) == list(ALL)
  facts = {stage: read_stage_facts(tmp_path, stage) for stage in ALL}
  assert [stage for stage in ALL if facts[stage].has_rollouts] == ["ppo"]
  assert [stage for stage in ALL if facts[stage].is_measurement] == ["eval"]
  assert all(facts[stage].title == get_stage(stage).title for stage in ALL)


def test_a_stage_that_resumes_keeps_its_facts(tmp_path):
  for title in (format_title("dpo_2"), "Another"):
    write_facts(tmp_path / "dpo_2", title)
  assert read_stage_facts(tmp_path, "dpo_2").title == "DPO, round 2"


def test_stages_that_are_done_are_skipped(tmp_path, ran, capsys):
  _builds, stages = ran
  runner.run_recipe(config(("sft_short", "sft_long")), str(tmp_path))
  runner.run_recipe(config(("sft_short", "sft_long", "label")), str(tmp_path))
  assert stages == ["sft_short", "sft_long", "label"]
  out = capsys.readouterr().out
  assert "sft_short: already done, skipped\nsft_long: already done, skipped" in out


def test_labels_that_given_preferences_replace_are_skipped(tmp_path, ran, capsys):
  _builds, stages = ran
  pairs = tmp_path / "pairs.jsonl"
  pairs.touch()
  made = config(("sft_short", "sft_long", "label", "rm"), rm__preferences=str(pairs))
  runner.run_recipe(made, str(tmp_path / "run"))
  assert stages == ["sft_short", "sft_long", "rm"]
  assert "label: skipped, because no later stage reads" in capsys.readouterr().out


def test_a_second_run_does_nothing_but_say_so(tmp_path, ran, capsys):
  builds, stages = ran
  runner.run_recipe(config(), str(tmp_path))
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
  capsys.readouterr()
  runner.run_recipe(config(), str(tmp_path))
  assert len(builds) == 1 and stages == list(ALL)
  assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == before
  skipped = [f"{stage}: already done, skipped" for stage in ALL]
  report = f"report: {tmp_path / 'report.html'}"
  assert capsys.readouterr().out.splitlines() == [*skipped, report]


def test_an_evaluation_runs_again_when_a_policy_has_come(tmp_path, ran):
  _, stages = ran
  runner.run_recipe(config(("sft_long", "eval")), str(tmp_path))
  runner.run_recipe(config(("sft_long", "eval")), str(tmp_path))
  assert stages == ["sft_long", "eval"]
  save_policy(tmp_path / "dpo")
  for _ in range(2):
    runner.run_recipe(config(("sft_long", "eval")), str(tmp_path))
  assert stages == ["sft_long", "eval", "eval"]
  done = json.loads((tmp_path / "eval" / "done.json").read_text())
  assert done["measured_policies"]["held_out"].keys() == {"dpo"}


def test_an_evaluation_runs_again_when_a_policy_was_trained_again(tmp_path, ran):
  _, stages = ran
  run = lambda: runner.run_recipe(config(("sft_long", "eval")), str(tmp_path))
  save_policy(tmp_path / "ppo")
  for _ in range(2):
    run()
  assert stages == ["sft_long", "eval"]
  shutil.rmtree(tmp_path / "ppo")
  save_policy(tmp_path / "ppo")
  for _ in range(2):
    run()
  assert stages == ["sft_long", "eval", "eval"]


def test_an_evaluation_runs_again_for_more_benchmarks(tmp_path, ran):
  _, stages = ran
  for names in (("held_out",), ("held_out", "chair"), ("chair",), ("held_out",)):
    runner.run_recipe(
      config(("sft_long", "eval"), evaluate__names=names), str(tmp_path)
    )
  assert stages == ["sft_long", "eval", "eval"]
  done = json.loads((tmp_path / "eval" / "done.json").read_text())
  assert done["measured_policies"] == {"held_out": {}, "chair": {}}


def save_policy(folder):
  write_facts(folder, "A policy")
  state = TrainState(np.int32(1), {"x": np.zeros(1)}, np.zeros(1))
  checkpoint.save_train_state(str(folder / "checkpoints"), state, 1, keep=1)


def test_a_stage_that_fails_is_not_done(tmp_path, ran, monkeypatch):
  def fail(run, stage, folder, log):
    raise RuntimeError("out of memory")

  made = runner.get_stage
  failing = lambda name: (
    made(name)._replace(run=fail) if name == "sft_long" else made(name)
  )
  monkeypatch.setattr(runner, "get_stage", failing)
  with pytest.raises(RuntimeError, match="out of memory"):
    runner.run_recipe(config(), str(tmp_path))
  assert (tmp_path / "sft_short" / "done.json").exists()
  assert not (tmp_path / "sft_long" / "done.json").exists()


def test_recipes_lead_to_what_they_are_named_for():
  from configs import eval as evaluation
  from configs import label, ppo, rm, sft

  ends = {sft: "sft_long", label: "label", rm: "rm", ppo: "eval", evaluation: "eval"}
  for module, last in ends.items():
    stages = module.get_config().stages
    assert stages == ALL[: ALL.index(last) + 1]


def test_an_unknown_stage_is_refused():
  with pytest.raises(UserError, match="stages must be of .*'dpi'"):
    runner.list_stages(config(("sft_short", "dpi")))


def test_config_on_disk_has_the_rounds_written_out(tmp_path):
  runner.check_workdir(config(("sft_long", "round"), rounds=1), tmp_path)
  kept = json.loads((tmp_path / "config.json").read_text())
  assert kept["stages"] == ["sft_long", "claims_1", "dpo_1"]


def test_rounds_are_written_out():
  made = config(("sft_long", "round", "eval"), rounds=2)
  rounds = ["claims_1", "dpo_1", "claims_2", "dpo_2"]
  assert runner.list_stages(made) == ["sft_long", *rounds, "eval"]
  assert get_stage("dpo_12") is get_stage("dpo")


# A workdir that holds another run.


def begin(root, made):
  runner.check_workdir(made, root)
  (root / "sft_short").mkdir()


def test_workdir_of_another_config_is_refused_with_both_values(tmp_path):
  begin(tmp_path, config(sft__optimizer__learning_rate=0.25, seed=2))
  with pytest.raises(UserError) as error:
    runner.check_workdir(config(sft__optimizer__learning_rate=0.5, seed=3), tmp_path)
  said = str(error.value)
  assert "sft.optimizer.learning_rate: 0.25 in the workdir, 0.5 now" in said
  assert "seed: 2 in the workdir, 3 now" in said
  assert "another --workdir" in said


def test_a_refused_config_does_not_replace_the_old_one(tmp_path):
  begin(tmp_path, config())
  for _ in range(2):
    with pytest.raises(UserError):
      runner.check_workdir(config(seed=3), tmp_path)


def test_a_stage_that_has_not_begun_may_change(tmp_path):
  begin(tmp_path, config())
  runner.check_workdir(config(ppo__steps=7), tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["ppo"]["steps"] == 7


def test_before_anything_has_begun_all_may_change(tmp_path):
  runner.check_workdir(config(data__records="wrong.json"), tmp_path)
  runner.check_workdir(config(data__records="right.json"), tmp_path)


def test_the_rendered_world_fixes_the_data(tmp_path):
  runner.check_workdir(config(data__sizes__sft=8), tmp_path)
  (tmp_path / "world").mkdir()
  with pytest.raises(UserError, match="data.sizes.sft: 8 in the workdir, 9 now"):
    runner.check_workdir(config(data__sizes__sft=9), tmp_path)


def test_sections_of_earlier_recipes_stay_in_the_config(tmp_path):
  begin(tmp_path, config(ppo__kl_coef=0.25))
  (tmp_path / "ppo").mkdir()
  sft = config(("sft_short",))
  del sft.ppo, sft.evaluate
  runner.check_workdir(sft, tmp_path)
  kept = json.loads((tmp_path / "config.json").read_text())
  assert kept["ppo"]["kl_coef"] == 0.25 and kept["stages"] == ["sft_short"]
  with pytest.raises(UserError, match="ppo.kl_coef: 0.25 in the workdir, 0.5 now"):
    runner.check_workdir(config(ppo__kl_coef=0.5), tmp_path)


def test_mesh_workers_and_further_stages_may_change(tmp_path):
  begin(tmp_path, config(("sft_short",)))
  runner.check_workdir(config(mesh__tensor=2, data__workers=7), tmp_path)


def test_a_server_that_no_stage_has_queried_may_change(tmp_path):
  begin(tmp_path, config(reward__terms__judge={"kwargs": {"url": "http://c/v1"}}))
  for stage in ("label", "ppo"):
    (tmp_path / stage).mkdir()
  kwargs = dict(reward__terms__judge={"kwargs": {"url": "http://c/v1"}})
  made = config(label__endpoint__url="http://a/v1", **kwargs)
  runner.check_workdir(made, tmp_path)
  for other in (
    config(label__endpoint__url="http://b/v1", **kwargs),
    config(label__endpoint__url="http://a/v1", reward__endpoint__model="m", **kwargs),
  ):
    with pytest.raises(UserError, match="endpoint.(url|model): "):
      runner.check_workdir(other, tmp_path)


@pytest.mark.parametrize(
  "setting, value",
  [
    ("sft__microbatches", 2),
    ("model__attention", "xla"),
    ("model__remat", "full"),
    ("ppo__slots", 16),
    ("label__batch", 16),
    ("grpo__oracle__endpoint__retries", 9),
    ("reward__timeout_s", 9.0),
    ("sft__save_every", 1),
  ],
)
def test_how_it_is_computed_may_change(tmp_path, setting, value):
  begin(tmp_path, config())
  (tmp_path / "ppo").mkdir()
  runner.check_workdir(config(**{setting: value}), tmp_path)
  section, *_, name = setting.split("__")
  kept = json.loads((tmp_path / "config.json").read_text())[section]
  assert str(value) in str(kept) and name in str(kept)


@pytest.mark.parametrize(
  "setting, value",
  [
    ("sft__batch_size", 16),
    ("sft__optimizer__learning_rate", 0.5),
    ("model__dtype", "bfloat16"),
    ("model__quant", "nf4"),
    ("label__block", 3),
    ("ppo__minibatches", 4),
    ("ppo__temperature", 0.5),
    ("reward__terms__stop__weight", -2.0),
    ("dpo__save_every", 3),
  ],
)
def test_what_is_computed_may_not_change(tmp_path, setting, value):
  begin(tmp_path, config())
  for stage in ("label", "ppo", "dpo"):
    (tmp_path / stage).mkdir()
  with pytest.raises(UserError, match=setting.replace("__", ".")):
    runner.check_workdir(config(**{setting: value}), tmp_path)
