"""Which recipes are refused and in what words; which stages run, and in what order."""

import importlib
import json
import pathlib

import pytest

from tests import small
from vlmrlaif_jax import recipe
from vlmrlaif_jax.recipe import RecipeError, Stage

RECIPES = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
  if path.stem not in ("__init__", "common", "pretrain", "prices", "study")
)
ALL = ("sft_short", "sft_long", "label", "rm", "ppo", "eval")


def config(stages=ALL, **settings):
  return small.config({"data.prompt_len": 64}, stages, **settings)


@pytest.fixture
def ran(monkeypatch):
  """Stages that only note that they ran; (how often build.make ran, the stages)."""
  builds, stages = [], []

  def make(config, workdir, watch):
    builds.append(workdir)
    nothing = [None] * (len(recipe.build.Run._fields) - 2)
    return recipe.build.Run(config, workdir, *nothing)

  def note(run, stage, folder, log):
    stages.append(stage)
    return {"rows": 3}

  entries = {
    name: Stage(entry.section, note, lambda run: 1)
    for name, entry in recipe.STAGES.items()
  }
  monkeypatch.setattr(recipe, "STAGES", entries)
  monkeypatch.setattr(recipe.build, "make", make)
  monkeypatch.setattr(recipe.report, "write_report", lambda root: root / "report.html")
  monkeypatch.setattr(recipe.jax.config, "update", lambda *setting: None)
  return builds, stages


# Stages.


def test_stages_run_in_order_and_leave_what_they_did(tmp_path, ran):
  builds, stages = ran
  recipe.run(config(), str(tmp_path))
  assert stages == list(ALL)
  assert builds == [tmp_path]  # Models and data are made once for all of them.
  for stage in ALL:
    done = json.loads((tmp_path / stage / "done.json").read_text())
    assert done["summary"] == {"rows": 3} and done["seconds"] >= 0


def test_stages_that_are_done_are_skipped(tmp_path, ran, capsys):
  builds, stages = ran
  recipe.run(config(("sft_short", "sft_long")), str(tmp_path))
  recipe.run(config(("sft_short", "sft_long", "label")), str(tmp_path))
  assert stages == ["sft_short", "sft_long", "label"]
  out = capsys.readouterr().out
  assert "sft_short: done before, skipped\nsft_long: done before, skipped" in out


def test_a_second_run_does_nothing_but_say_so(tmp_path, ran, capsys):
  builds, stages = ran
  recipe.run(config(), str(tmp_path))
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
  capsys.readouterr()
  recipe.run(config(), str(tmp_path))
  assert len(builds) == 1 and stages == list(ALL)
  assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == before
  skipped = [f"{stage}: done before, skipped" for stage in ALL]
  report = f"report: {tmp_path / 'report.html'}"
  assert capsys.readouterr().out.splitlines() == [*skipped, report]


def test_a_stage_that_fails_is_not_done(tmp_path, ran, monkeypatch):
  def fail(run, stage, folder, log):
    raise RuntimeError("out of memory")

  failing = recipe.STAGES["sft_long"]._replace(run=fail)
  monkeypatch.setitem(recipe.STAGES, "sft_long", failing)
  with pytest.raises(RuntimeError, match="out of memory"):
    recipe.run(config(), str(tmp_path))
  assert (tmp_path / "sft_short" / "done.json").exists()
  assert not (tmp_path / "sft_long" / "done.json").exists()


def test_recipes_lead_to_what_they_are_named_for():
  from configs import eval as evaluation
  from configs import label, ppo, ppo_reference, rm, sft

  ends = {sft: "sft_long", label: "label", rm: "rm", ppo: "eval", evaluation: "eval"}
  for module, last in {**ends, ppo_reference: "eval"}.items():
    stages = module.get_config().stages
    assert stages == ALL[: ALL.index(last) + 1]


def test_an_unknown_stage_is_refused():
  with pytest.raises(RecipeError, match="stages must be of .*, not 'dpi'"):
    recipe.stages_of(config(("sft_short", "dpi")))


def test_config_on_disk_has_the_rounds_written_out(tmp_path):
  recipe.check_workdir(config(("sft_long", "round"), rounds=1), tmp_path)
  kept = json.loads((tmp_path / "config.json").read_text())
  assert kept["stages"] == ["sft_long", "claims_1", "dpo_1"]


def test_rounds_are_written_out():
  made = config(("sft_long", "round", "eval"), rounds=2)
  rounds = ["claims_1", "dpo_1", "claims_2", "dpo_2"]
  assert recipe.stages_of(made) == ["sft_long", *rounds, "eval"]
  assert recipe.stage_of("dpo_12") is recipe.STAGES["dpo"]


# Paths.


def test_all_missing_paths_are_told_at_once():
  with pytest.raises(RecipeError) as error:
    recipe.check_paths(
      config(
        model__path="here/no", data__records="no.json", data__videos="no/videos",
        data__prompts="no/prompts.json", rm__preferences="no/pairs.jsonl",
      )
    )  # fmt: skip
  said = str(error.value)
  for flag in (
    "--config.model.path=here/no",
    "--config.data.records=no.json",
    "--config.data.videos=no/videos",
    "--config.data.prompts=no/prompts.json",
    "--config.rm.preferences=no/pairs.jsonl",
  ):
    assert flag in said
  assert said.count("put there") == 5


def test_paths_that_are_there_are_not_told(tmp_path):
  with pytest.raises(RecipeError) as error:
    recipe.check_paths(config(data__records="no.json", data__videos=str(tmp_path)))
  assert str(tmp_path) not in str(error.value)


# Batches, on four devices.


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"sft__batch_size": 6}, "sft.batch_size: 6 rows in 1 parts .* multiple of 4"),
    (
      {"rm__batch_size": 12, "rm__microbatches": 2, "rm__centre_coef": 0.0},
      "rm.batch_size: 12 rows in 2 parts over 4 devices .* multiple of 8",
    ),
    (
      {"ppo__batch_size": 8, "ppo__minibatches": 4},
      "ppo.batch_size: 8 rows in 4 parts over 4 devices .* multiple of 16",
    ),
    (
      {"ppo__batch_size": 6, "ppo__samples": 4, "ppo__minibatches": 1},
      "ppo.batch_size: 6 prompts over 4 devices",
    ),
    (
      {"stages": ("grpo",), "grpo__batch_size": 12, "grpo__samples": 4},
      "grpo.batch_size: 12 rows in 2 parts .* multiple of 8",
    ),
    ({"evaluate__batch": 10}, "evaluate.batch: 10 rows"),
    ({"label__batch": 10}, "label.batch: 10 rows"),
  ],
)
def test_a_batch_that_does_not_divide_is_refused_with_a_remedy(settings, said):
  with pytest.raises(RecipeError, match=said) as error:
    recipe.check_batches(config(**settings))
  assert "--config.mesh.tensor" in str(error.value)


def test_tensor_devices_take_no_share_of_the_rows():
  recipe.check_batches(config(sft__batch_size=6, mesh__fsdp=2, mesh__tensor=2))


def test_only_the_batches_of_the_recipes_stages_count():
  recipe.check_batches(config(("sft_short", "sft_long"), ppo__batch_size=6))


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(RecipeError, match="tensor=3 does not fit 4 devices.*config.mesh"):
    recipe.check_batches(config(mesh__tensor=3))


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (
      {"data__response_len": 47},
      r"sft: data.prompt_len \+ data.response_len is 111, to be 112",
    ),
    ({"ppo__chunk": 31}, "ppo.chunk is 31, to be 32"),
    ({"model__attention": "cudnn"}, "cudnn does not work on parts of rows"),
  ],
)
def test_what_context_does_not_divide_is_refused_with_a_remedy(settings, said):
  over = dict(mesh__fsdp=2, mesh__context=2)
  recipe.check_mesh(config(data__response_len=48, **over))
  with pytest.raises(RecipeError, match=said) as error:
    recipe.check_mesh(config(**{"data__response_len": 48, **settings, **over}))
  assert "--config.mesh.context=1" in str(error.value)
  recipe.check_mesh(config(**settings))


def test_a_prompt_that_is_only_read_may_have_any_length():
  recipe.check_mesh(config(("label",), label__judge_prompt_len=257, mesh__context=2))


def test_heads_that_tensor_does_not_divide_are_refused_for_splash(tiny_checkpoint):
  given = dict(model__path=str(tiny_checkpoint), mesh__fsdp=1, mesh__tensor=4)
  recipe.check_mesh(config(**given))
  with pytest.raises(RecipeError, match="has 2 key and value heads, .* mesh.tensor=4"):
    recipe.check_mesh(config(**given, model__attention="splash"))


def test_centre_term_is_refused_in_microbatches():
  with pytest.raises(RecipeError, match="centre_coef=0.001 .* 2 microbatches"):
    recipe.check_batches(config(rm__microbatches=2, rm__centre_coef=0.001))


@pytest.mark.parametrize("preset", ["tiny", "7b"])
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_fit_four_devices(name, preset):
  made = importlib.import_module(f"configs.{name}").get_config(preset)
  recipe.stages_of(made)
  recipe.check_batches(made)
  recipe.check_mesh(made)
  recipe.check_schedules(made)


def test_a_warm_up_that_never_ends_is_refused():
  with pytest.raises(RecipeError, match="sft.optimizer.warmup_steps=5, of 3 updates"):
    recipe.check_schedules(config(sft__short_steps=3, sft__optimizer__warmup_steps=5))


def test_a_warm_up_counts_updates_not_rollouts():
  settings = dict(ppo__epochs=2, ppo__minibatches=2, ppo__optimizer__warmup_steps=7)
  recipe.check_schedules(config(ppo__steps=2, **settings))
  with pytest.raises(RecipeError, match="ppo.optimizer.warmup_steps=7, of 4 updates"):
    recipe.check_schedules(config(ppo__steps=1, **settings))


# A workdir that holds another run.


def begin(root, made):
  recipe.check_workdir(made, root)
  (root / "sft_short").mkdir()


def test_workdir_of_another_config_is_refused_with_both_values(tmp_path):
  begin(tmp_path, config(sft__optimizer__learning_rate=0.25, seed=2))
  with pytest.raises(RecipeError) as error:
    recipe.check_workdir(config(sft__optimizer__learning_rate=0.5, seed=3), tmp_path)
  said = str(error.value)
  assert "sft.optimizer.learning_rate: 0.25 there, 0.5 now" in said
  assert "seed: 2 there, 3 now" in said
  assert "another --workdir" in said


def test_a_refused_config_does_not_replace_the_old_one(tmp_path):
  begin(tmp_path, config())
  for _ in range(2):
    with pytest.raises(RecipeError):
      recipe.check_workdir(config(seed=3), tmp_path)


def test_a_stage_that_has_not_begun_may_change(tmp_path):
  begin(tmp_path, config())
  recipe.check_workdir(config(ppo__steps=7), tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["ppo"]["steps"] == 7


def test_before_anything_has_begun_all_may_change(tmp_path):
  recipe.check_workdir(config(data__records="wrong.json"), tmp_path)
  recipe.check_workdir(config(data__records="right.json"), tmp_path)


def test_the_rendered_world_fixes_the_data(tmp_path):
  recipe.check_workdir(config(data__sizes__sft=8), tmp_path)
  (tmp_path / "world").mkdir()
  with pytest.raises(RecipeError, match="data.sizes.sft: 8 there, 9 now"):
    recipe.check_workdir(config(data__sizes__sft=9), tmp_path)


def test_mesh_workers_and_further_stages_may_change(tmp_path):
  begin(tmp_path, config(("sft_short",)))
  recipe.check_workdir(config(mesh__tensor=2, data__workers=7), tmp_path)
