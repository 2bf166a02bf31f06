"""The term `rank`, on a server of this machine."""

import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.terms import rank, scorer


def reply(prompt):
  """Prefers longer responses; "hm" is never ranked."""
  if "hm" in prompt:
    return "I cannot tell."
  texts = re.findall(r"^\[\d+\] (.*)$", prompt, re.MULTILINE)
  order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
  return str([i + 1 for i in order])


@pytest.fixture
def chat(chat):
  chat.judge = reply
  return chat


def group(id, *responses):
  return [sample(id=id, response=text, video=()) for text in responses]


def score(chat, samples, **kwargs):
  config = scorer.default_config()
  config.terms = ConfigDict({"rank": {"kwargs": kwargs}})
  config.endpoint.update(url=chat.url, model="m", key_env="", retries=0)
  terms = scorer.load_terms(config, cache=None)
  return scorer.score_samples(config, terms, samples, None)


def test_the_value_is_the_share_of_the_group_that_a_response_beats(chat):
  samples = [*group("a", "A dog.", "A", "A red dog."), *group("b", "B", "B", "Be.")]
  result = score(chat, samples)
  assert result.scores.tolist() == [0.5, 0, 1, 0, 0, 1]
  assert result.valid.all() and len(chat.requests) == 2


def test_a_group_without_a_readable_ranking_is_invalid(chat):
  samples = [*group("a", "hm", "A"), *group("b", "B", "Be."), *group("c", "C")]
  result = score(chat, samples)
  np.testing.assert_array_equal(result.raw["rank"], [np.nan, np.nan, 0, 1, np.nan])
  assert "is no ranking" in result.failures["rank"]
  assert "has one response" in score(chat, group("c", "C")).failures["rank"]


def test_pairs_are_compared_in_both_orders(chat):
  chat.judge = lambda prompt: (
    "Output A is better." if "Output A: Be." in prompt else "Output B is better."
  )
  result = score(chat, group("a", "B", "Be."), kind="pairs", sees_video=False)
  assert len(chat.requests) == 2
  assert result.scores.tolist() == [0, 1]


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"kind": "grm"}, "kwargs.kind must be one of list, pairs, not 'grm'"),
    ({"style": "long"}, "kwargs.style must be one of .* not 'long'"),
    ({"modell": "m"}, "kwargs.modell must be one of"),
    ({}, "kwargs.url must be like"),
  ],
)
def test_wrong_settings_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    rank.read_rank_settings(kwargs, endpoint.default_config())
