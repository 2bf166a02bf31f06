"""Which recipes are refused, and in what words."""

import importlib
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from configs import front
from configs.published import PUBLISHED
from tests.helpers import small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.recipes import validation
from vlmrlaif_jax.stages.stage import get_stage
from vlmrlaif_jax.stages.training import ppo

RECIPES = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
  if path.stem not in ("__init__", "front", "pretrain", "prices", "published")
)
ALL = ("sft_short", "sft_long", "label", "rm", "ppo", "eval")


def config(stages=ALL, **settings):
  return small.config({"data.prompt_len": 64}, stages, **settings)


def check(check, made):
  kinds = {split_round(name)[0] for name in validation.list_stages(made)}
  check(made, [get_stage(kind) for kind in sorted(kinds)])


def test_choosing_by_claims_checks_the_claims_of_a_recipe_without_that_stage():
  made = config(("dpo",), dpo__select="claims", claims__batch=0)
  with pytest.raises(UserError, match="claims.batch"):
    get_stage("dpo").check_settings(made)


# Sections.


@pytest.mark.parametrize("preset", ["tiny", "7b", "tiny_qwen3vl", *PUBLISHED])
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_have_the_sections_that_their_stages_read(name, preset):
  made = importlib.import_module(f"configs.{name}").get_config(preset)
  stages = [get_stage(stage) for stage in validation.list_stages(made)]
  read = {section for s in stages for section in (s.section, *s.reads(made))}
  sections = {key for key, value in made.items() if isinstance(value, ConfigDict)}
  shared = {"mesh", "model", "data"} | (sections & {"judge"})
  assert sections == read | shared
  assert (made.recipe, made.preset) == (name, preset)


@pytest.mark.parametrize(
  ("lost", "stages", "settings", "reader"),
  [
    ("ppo", ALL, {}, "ppo"),
    ("label", ("eval",), {}, "eval"),
    ("claims", ("dpo",), {"dpo__select": "claims"}, "dpo"),
    ("rm", ("grm",), {}, "grm"),
  ],
)
def test_a_section_that_a_stage_lacks_is_named(lost, stages, settings, reader):
  made = config(stages, **settings)
  del made[lost]
  with pytest.raises(UserError, match=f"no section '{lost}', which stage '{reader}'"):
    validation.check_recipe(made)


def test_the_new_name_of_a_section_or_a_stage_is_given():
  made = config(("eval",))
  made.benchmarks = ConfigDict({"names": ("chair",)})
  with pytest.raises(UserError, match="'benchmarks' is now 'evaluate'"):
    validation.check_recipe(made)
  with pytest.raises(UserError, match="'benchmarks' is now 'eval'"):
    validation.list_stages(config(("sft_short", "benchmarks")))


def test_sections_that_no_setting_asks_for_may_be_missing():
  made = config(("dpo", "eval"), evaluate__held_out__judge=False)
  del made.claims, made.label
  check(validation.check_sections, made)


def test_ppo_ranks_groups_of_several_responses():
  server = dict(url="http://localhost/v1", model="m", key_env="")
  made = config(("ppo",), reward__terms__rank={"kwargs": server})
  with pytest.raises(UserError, match="reward.terms.rank .*--config.ppo.samples=4"):
    get_stage("ppo").check_settings(made)
  made.ppo.samples = 2
  get_stage("ppo").check_settings(made)


def test_a_recipe_must_set_what_has_no_default():
  with pytest.raises(ValueError, match=r"kl_coef, .*optimizer.learning_rate"):
    front.make_section(ppo.default_config(), steps=1)


def test_a_recipe_cannot_set_what_does_not_exist():
  with pytest.raises(KeyError, match="kl_coeff"):
    front.make_section(ppo.default_config(), kl_coeff=0.1)


# Paths.


def test_all_missing_paths_are_told_at_once():
  with pytest.raises(UserError) as error:
    validation.check_paths(
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
  assert said.count("expected: ") == 5


def test_a_scorer_s_path_is_asked_for_where_there_is_a_reward_model():
  given = dict(model__path="here/no", model__reward_model_path="none/there")
  for stages in (ALL, ("sft_short", "sft_long")):
    with pytest.raises(UserError) as error:
      validation.check_paths(config(stages, **given))
    assert ("--config.model.reward_model_path=none/there" in str(error.value)) == (
      "rm" in stages
    )


def test_paths_that_are_there_are_not_told(tmp_path):
  with pytest.raises(UserError) as error:
    validation.check_paths(config(data__records="no.json", data__videos=str(tmp_path)))
  assert str(tmp_path) not in str(error.value)


# Batches, on four devices.


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"sft__batch_size": 6}, "sft.batch_size: 6 rows in 1 parts .* multiple of 4"),
    (
      {"rm__batch_size": 12, "rm__microbatches": 2, "rm__centre_coef": 0.0},
      "rm.batch_size: 12 rows in 2 parts on 4 row shards .* multiple of 8",
    ),
    (
      {"ppo__batch_size": 8, "ppo__minibatches": 4},
      "ppo.batch_size: 8 rows in 4 parts on 4 row shards .* multiple of 16",
    ),
    (
      {"ppo__batch_size": 6, "ppo__samples": 4, "ppo__minibatches": 1},
      r"ppo.batch_size \(prompts\): 6 rows in 1 parts on 4 row shards",
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
  with pytest.raises(UserError, match=said) as error:
    check(validation.check_batches, config(**settings))
  assert "--config.mesh.tensor" in str(error.value)


def test_tensor_devices_take_no_share_of_the_rows():
  check(
    validation.check_batches, config(sft__batch_size=6, mesh__fsdp=2, mesh__tensor=2)
  )


def test_only_the_batches_of_the_recipes_stages_count():
  check(validation.check_batches, config(("sft_short", "sft_long"), ppo__batch_size=6))


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(UserError, match="tensor=3 does not fit 4 devices.*config.mesh"):
    check(validation.check_batches, config(mesh__tensor=3))


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (
      {"data__response_len": 47},
      r"sft: data.prompt_len \+ data.response_len is 111; the next valid one is 112",
    ),
    ({"ppo__chunk": 31}, "ppo.chunk is 31; the next valid one is 32"),
    ({"model__attention": "cudnn"}, "cudnn does not support parts of rows"),
  ],
)
def test_what_context_does_not_divide_is_refused_with_a_remedy(settings, said):
  over = dict(mesh__fsdp=2, mesh__context=2)
  check(validation.check_mesh, config(data__response_len=48, **over))
  with pytest.raises(UserError, match=said) as error:
    check(
      validation.check_mesh, config(**{"data__response_len": 48, **settings, **over})
    )
  assert "--config.mesh.context=1" in str(error.value)
  check(validation.check_mesh, config(**settings))


def test_a_prompt_that_is_only_read_may_have_any_length():
  check(
    validation.check_mesh,
    config(("label",), label__judge_prompt_len=257, mesh__context=2),
  )


def test_centre_term_is_refused_in_microbatches():
  with pytest.raises(UserError, match="--config.rm.centre_coef=0.001"):
    get_stage("rm").check_settings(config(rm__microbatches=2, rm__centre_coef=0.001))


@pytest.mark.parametrize("preset", ["tiny", "7b"])
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_fit_four_devices(name, preset):
  made = importlib.import_module(f"configs.{name}").get_config(preset)
  check(validation.check_batches, made)
  check(validation.check_mesh, made)


def test_a_warm_up_that_never_ends_is_refused():
  with pytest.raises(UserError, match="--config.sft.optimizer.warmup_steps"):
    get_stage("sft_short").check_settings(
      config(sft__short_steps=3, sft__optimizer__warmup_steps=5)
    )


def test_a_warm_up_counts_updates_not_rollouts():
  settings = dict(ppo__epochs=2, ppo__minibatches=2, ppo__optimizer__warmup_steps=7)
  get_stage("ppo").check_settings(config(ppo__steps=2, **settings))
  with pytest.raises(UserError, match="--config.ppo.optimizer.warmup_steps"):
    get_stage("ppo").check_settings(config(ppo__steps=1, **settings))


# Every setting that has a few allowed values.

# Text that a user is free to choose: paths, names and questions.
FREE_TEXT = re.compile(
  r"(recipe|preset|stages"
  r"|data\.(records|videos|(label_)?prompts|benchmark|features)"
  r"|model\.(path|reward_model_path|tower)|(rm|dpo)\.preferences"
  r"|judges\.(pairs|scores|videos)"
  r"|evaluate\.(clip|(?!held_out\.)\w+\.(?!by$)\w+)"
  r"|.*endpoint\.(url|model|key_env|length_field)|.*alarms\.truths)$"
)


def leaves(made, at=""):
  for key, value in made.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{at}{key}.")
    elif isinstance(value, str | tuple):
      yield at + key, value


def choices():
  """(recipe, setting) of every setting of words that its stages read."""
  for name in RECIPES:
    made = importlib.import_module(f"configs.{name}").get_config()
    read = {get_stage(s).section for s in validation.list_stages(made)} | {
      "model",
      "data",
    }
    for key, _ in leaves(made):
      if key.split(".")[0] in read and not FREE_TEXT.match(key):
        yield name, key


@pytest.mark.parametrize(("name", "key"), sorted(choices()))
def test_nonsense_is_refused_by_its_flag_in_one_line(name, key):
  made = importlib.import_module(f"configs.{name}").get_config()
  value = dict(leaves(made))[key]
  nonsense = ("nonsense",) if isinstance(value, tuple) else "nonsense"
  made.update_from_flattened_dict({key: nonsense})
  with pytest.raises(UserError) as error:
    validation.check_recipe(made)
  said = str(error.value)
  assert f"--config.{key}" in said and "nonsense" in said and "\n" not in said


def test_recipes_have_settings_of_words():
  assert len(list(choices())) > 150
