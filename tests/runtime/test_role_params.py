"""What each role starts from, and which arrays the roles share."""

import chex
import jax
import numpy as np
import pytest

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.stages.stage import load_workdir_policies


def has_no_effect(lora):
  """Whether all products of factors are 0."""
  return not any(x.any() for x in list_factors(lora, "b"))


def list_factors(lora, name):
  flat, _ = jax.tree.flatten_with_path(lora)
  return [np.array(x) for path, x in flat if path[-1].key == name]


def test_reward_model_adds_to_the_sft_policy(one):
  sft = role_params.load_policy(one, "sft_long")
  base, model = role_params.load_reward_model_base(one), one.config.model
  chex.assert_trees_all_equal(base["params"]["projector"], sft["params"]["projector"])
  scale = model.sft_lora_alpha / model.sft_lora_rank
  assert scale != 1
  for name, by in (("a", 1), ("b", scale)):
    factors = list_factors(base["frozen_lora"], name), list_factors(sft["lora"], name)
    for frozen, trained in zip(*factors, strict=True):
      np.testing.assert_allclose(frozen, trained * by, rtol=1e-6)
      assert frozen.any()
  start = role_params.init_reward_model(one)["lora"]
  assert has_no_effect(start) and all(x.any() for x in list_factors(start, "a"))


def test_ranks_are_those_of_the_stage(one):
  model = one.config.model
  assert model.sft_lora_rank != model.lora_rank
  sft, ppo = (
    role_params.init_policy(one),
    role_params.make_policy_roles(one, "sft_long"),
  )
  for lora, rank in (
    (sft["lora"], model.sft_lora_rank),
    (ppo[0]["policy"]["lora"], model.lora_rank),
    (role_params.init_reward_model(one)["lora"], model.lora_rank),
  ):
    assert {x.shape[-1] for x in list_factors(lora, "a")} == {rank}


def test_ppo_starts_from_sft_and_a_critic_from_the_reward_model(one, ppo_on_one):
  start = ppo_on_one.start
  reward = jax.device_get(role_params.load_reward_model(one))
  assert has_no_effect(start["policy"]["lora"])
  chex.assert_trees_all_equal(start["critic"]["lora"], reward["lora"])
  assert not any(x.any() for x in jax.tree.leaves(start["critic"]["params"]["head"]))


def test_critic_head_may_be_the_reward_models(one):
  params, frozen = role_params.make_ppo_roles(one, "reward", has_reward_model=True)
  chex.assert_trees_all_equal(
    params["critic"]["params"]["head"], frozen["reward"]["params"]["head"]
  )


def test_the_reference_is_the_sft_policy_and_shares_its_base(one):
  _, frozen = role_params.make_ppo_roles(one, "zero", has_reward_model=True)
  assert frozen["ref"] is frozen["policy"] and "lora" not in frozen["ref"]
  frozen_lora = frozen["policy"]["frozen_lora"]
  assert (
    frozen["critic"]["frozen_lora"] is frozen["reward"]["frozen_lora"] is frozen_lora
  )
  llm = one.base["params"]["llm"]["embed"]["embedding"]
  for role in ("policy", "ref", "reward", "critic"):
    assert frozen[role]["params"]["llm"]["embed"]["embedding"] is llm


def test_a_stage_that_was_not_run_is_named(one):
  with pytest.raises(UserError, match="never_run"):
    role_params.load_policy(one, "never_run")


def test_policies_are_those_that_are_there(one, ppo_on_one):
  found = load_workdir_policies(one)
  assert set(found) == {"sft", "ppo"}
  lora = jax.device_get(found["ppo"]["lora"])
  chex.assert_trees_all_equal(
    lora, jax.device_get(ppo_on_one.state.params["policy"]["lora"])
  )
