"""The recipes of Generative RLHF-V: the paper's constants, and the checks they pass."""

import pytest

from configs import grm, grpo_grm
from tests.helpers import small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.recipes import validation


@pytest.mark.parametrize("module", [grm, grpo_grm])
def test_recipes_pass_all_checks(module):
  validation.check_recipe(module.get_config())


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
    assert (part.kl_coef, part.temperature) == (0.02, 1.0)
    assert (part.surrogate, part.clip_eps_low, part.clip_eps_high) == (
      "ppo_clip",
      0.2,
      0.2,
    )
    assert (part.advantage, part.truncated_responses) == ("grpo_scalar", "keep")
    assert part.optimizer.weight_decay == 0.01
    assert part.optimizer.schedule == "cosine"
    updates = part.steps * part.epochs * part.minibatches
    assert part.optimizer.warmup_steps / updates == pytest.approx(0.03, abs=1e-3)


@pytest.mark.parametrize(
  "settings, flag",
  [
    ({"grm__batch_size": 6}, "grm.batch_size"),
    ({"grm_sft__batch_size": 6}, "grm_sft.batch_size"),
    ({"judges__batch": 6}, "judges.batch"),
    ({"grm__optimizer__warmup_steps": 60}, "grm.optimizer.warmup_steps"),
    ({"grm_sft__optimizer__warmup_steps": 20}, "grm_sft.optimizer.warmup_steps"),
  ],
)
def test_sections_of_judges_are_checked(settings, flag):
  stages = ("grm_sft", "grm", "judges")
  with pytest.raises(UserError, match=f"--config.{flag}"):
    validation.check_recipe(small.config({"data.prompt_len": 64}, stages, **settings))
