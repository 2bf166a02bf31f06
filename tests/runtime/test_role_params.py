"""What each role starts from, and which arrays the roles share."""

import chex
import jax
import pytest

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.stages.stage import load_workdir_policies


def test_reward_model_starts_from_sft_and_sees_with_its_projector(one):
  sft = role_params.load_policy(one, "sft_long")
  chex.assert_trees_all_equal(role_params.init_reward_model(one)["lora"], sft["lora"])
  chex.assert_trees_all_equal(
    role_params.load_reward_model_base(one)["params"]["projector"],
    sft["params"]["projector"],
  )


def test_ppo_starts_from_sft_and_a_critic_from_the_reward_model(one, ppo_on_one):
  start = ppo_on_one.start
  sft = jax.device_get(role_params.load_policy(one, "sft_long"))
  reward = jax.device_get(role_params.load_reward_model(one))
  chex.assert_trees_all_equal(start["policy"]["lora"], sft["lora"])
  chex.assert_trees_all_equal(start["critic"]["lora"], reward["lora"])
  assert not any(x.any() for x in jax.tree.leaves(start["critic"]["params"]["head"]))


def test_critic_head_may_be_the_reward_models(one):
  params, frozen = role_params.make_ppo_roles(one, "reward", has_reward_model=True)
  chex.assert_trees_all_equal(
    params["critic"]["params"]["head"], frozen["reward"]["params"]["head"]
  )


def test_the_reference_is_the_sft_policy_and_shares_its_base(one):
  _, frozen = role_params.make_ppo_roles(one, "zero", has_reward_model=True)
  sft = role_params.load_policy(one, "sft_long")
  chex.assert_trees_all_equal(frozen["ref"]["lora"], sft["lora"])
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
