"""Sections that recipes share: the section `judge` sets every server of a recipe."""

import importlib

import pytest

from configs import front, grpo, sft
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.terms import scorer

SERVERS = {
  "ppo": ["label.endpoint", "evaluate.endpoint", "reward.endpoint"],
  "grpo": ["label.endpoint", "grpo.oracle.endpoint", "reward.endpoint"],
  "rlaif_v": ["claims.endpoint", "label.endpoint", "evaluate.endpoint"],
  "grm": ["judges.endpoint", "grm.oracle.endpoint", "label.endpoint"],
}


def find(config, place):
  for name in place.split("."):
    config = config[name]
  return config


@pytest.mark.parametrize("recipe", SERVERS)
@pytest.mark.parametrize("preset", ["tiny", "qwen3vl_4b"])
def test_every_server_follows_the_section_judge(recipe, preset):
  config = importlib.import_module(f"configs.{recipe}").get_config(preset)
  config.judge.update(url="http://a/v1", model="m", retries=2, temperature=0.5)
  want = {**endpoint.default_config(), **config.judge.to_dict()}
  for place in SERVERS[recipe]:
    assert find(config, place).to_dict() == want
  copied = config.copy_and_resolve_references()
  copied.judge.model = "other"
  assert find(copied, SERVERS[recipe][0]).model == "m"


def test_a_value_of_one_stage_changes_no_other():
  config = grpo.get_config()
  config.label.endpoint.model = "labeler"
  config.judge.model = "m"
  assert config.label.endpoint.model == "labeler"
  assert config.evaluate.endpoint.model == config.grpo.oracle.endpoint.model == "m"


def test_a_server_that_a_recipe_sets_stays():
  config = grpo.tiny()
  config.label.endpoint.frames = 3
  front.share_judge(config).judge.frames = 5
  assert (config.label.endpoint.frames, config.evaluate.endpoint.frames) == (3, 5)


def test_a_recipe_without_servers_has_no_judge():
  assert "judge" not in sft.get_config()


def test_terms_query_the_server_of_the_judge_unless_they_have_their_own():
  config = grpo.get_config()
  config.judge.update(url="http://a/v1", model="m", key_env="")
  for name, own in (("judge", {}), ("claims", {}), ("rubric", {"url": "b"})):
    config.reward.terms[name] = {"kwargs": own}
  with pytest.raises(ValueError, match="terms.rubric.kwargs.url must .*'b'"):
    scorer.check(config.reward)
  config.reward.terms.rubric.kwargs.url = "http://b/v1"
  scorer.check(config.reward)
