"""The recipes of Generative RLHF-V: the paper's constants, and the checks they pass."""

import pytest

from configs import grm, grpo_grm
from tests.helpers import small
from vlmrlaif_jax.recipes import runner, validation
from vlmrlaif_jax.recipes.validation import RecipeError


@pytest.mark.parametrize("module", [grm, grpo_grm])
@pytest.mark.parametrize("preset", ["tiny", "7b"])
def test_recipes_pass_the_checks_of_batches_and_warm_ups(module, preset):
  config = module.get_config(preset)
  used = runner.sections(config)
  validation.check_batches(config, used)
  validation.check_schedules(config, used)


def test_both_stages_have_the_papers_constants():
  config = grpo_grm.get_config("7b")
  assert (config.grm.samples, config.grpo.samples) == (8, 5)
  assert (config.grm.prompt_len, config.grm.max_new) == (12800, 2048)
  assert (config.data.prompt_len, config.data.response_len) == (4096, 512)
  oracle = config.grpo.oracle
  assert (oracle.kind, oracle.grm_stage, oracle.both_orders) == ("grm", "grm", True)
  assert (oracle.prompt_len, oracle.max_new) == (12800, 2048)
  for part in (config.grm, config.grpo):
    assert part.batch_size == 360
    assert (part.kl_coef, part.clip_eps, part.temperature) == (0.02, 0.2, 1.0)
    assert (part.rank_adv, part.truncated) == ("grpo_scalar", "keep")
    assert part.optimizer.weight_decay == 0.01
    assert part.optimizer.schedule == "cosine"
    updates = part.steps * part.epochs * part.minibatches
    assert part.optimizer.warmup_steps / updates == pytest.approx(0.03, abs=1e-3)


@pytest.mark.parametrize(
  ("settings", "check", "said"),
  [
    ({"grm__batch_size": 6}, validation.check_batches, "grm.batch_size: 6 rows"),
    (
      {"grm_sft__batch_size": 6},
      validation.check_batches,
      "grm_sft.batch_size: 6 rows",
    ),
    ({"judges__batch": 6}, validation.check_batches, "judges.batch: 6 rows"),
    (
      {"grm__optimizer__warmup_steps": 60},
      validation.check_schedules,
      "grm.optimizer.warmup_steps=60",
    ),
    (
      {"grm_sft__optimizer__warmup_steps": 20},
      validation.check_schedules,
      "grm_sft.optimizer.warmup_steps=20, of 20 updates",
    ),
  ],
)
def test_sections_of_judges_are_checked(settings, check, said):
  stages = ("grm_sft", "grm", "judges")
  with pytest.raises(RecipeError, match=said):
    check(small.config({"data.prompt_len": 64}, stages, **settings), set(stages))
