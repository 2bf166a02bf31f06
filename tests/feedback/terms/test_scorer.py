"""Terms of a reward: their settings, combination, metrics and failures."""

import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.core.errors import UserError, user_errors
from vlmrlaif_jax.feedback.terms import scorer

CACHE = pathlib.Path("no_such_folder/replies.jsonl")
SAMPLES = [
  sample(id="a", tokens=(1,) * 3),
  sample(id="a", tokens=(1,) * 6, stopped=False),
  sample(id="b", response="No.", answer=""),
  sample(id="b", response="A dog"),
]


def section(**terms):
  config = scorer.default_config()
  config.terms = ConfigDict({name: dict(each) for name, each in terms.items()})
  return config


def score(config, model_scores=None, group=2):
  terms = scorer.load_terms(config, CACHE)
  return scorer.score_samples(config, terms, SAMPLES, model_scores, group=group)


def test_scores_are_the_weighted_sum_of_the_terms():
  config = scorer.default_config()
  config.terms.length.weight = -10.0
  result = score(config, np.array([1.0, 2, 3, 4]))
  np.testing.assert_allclose(result.scores, [1 - 5, 2 - 1 - 10, 3 - 5, 4 - 5])
  np.testing.assert_allclose(sum(result.weighted.values()), result.scores)
  assert list(result.raw) == ["length", "reward_model", "stop"] and result.valid.all()
  assert scorer.compute_term_metrics(result) == {
    "terms/reward_model": 2.5,
    "terms/reward_model/weighted": 2.5,
    "terms/stop": 0.25,
    "terms/stop/weighted": -0.25,
    "terms/length": 0.625,
    "terms/length/weighted": -6.25,
  }


def test_a_term_without_weight_is_not_computed():
  config = scorer.default_config()
  assert [term.name for term in scorer.load_terms(config, CACHE)] == [
    "reward_model",
    "stop",
  ]
  assert scorer.has_model_term(config)
  config.terms.reward_model.weight = 0.0
  assert not scorer.has_model_term(config)


def test_a_sample_that_a_term_cannot_score_is_invalid():
  result = score(section(exact_match={}, stop={"weight": -1.0}))
  np.testing.assert_array_equal(result.valid, [True, True, False, True])
  assert "returned None" in result.failures["exact_match"]
  assert scorer.compute_term_metrics(result)["terms/exact_match"] == 1


def test_terms_are_normalized_within_groups_and_their_sum_over_the_batch():
  config = section(exact_match={"weight": 2.0}, length={})
  config.combine = "group"
  result = score(config)
  # Within groups, two values have the distance 1 / sqrt(2) from their mean. The valid
  # sums -1 / sqrt(2), 1 / sqrt(2) and 0 have the deviation 1 / sqrt(2).
  want = {"exact_match": [0, 0, np.nan, 0], "length": [-1, 1, 0, 0]}
  for name, values in want.items():
    np.testing.assert_allclose(result.weighted[name], values, atol=1e-3)
  np.testing.assert_array_equal(result.valid, [True, True, False, True])


def combine_by_group(weights, group, **values):
  """Scores and parts of samples whose terms have given values."""
  config = scorer.default_config()
  config.combine = "group"
  count = len(next(iter(values.values())))
  terms = [
    scorer.Term(name, weights[name], lambda samples, own=own: own)
    for name, own in values.items()
  ]
  samples = [sample(id=str(i // group)) for i in range(count)]
  return scorer.score_samples(config, terms, samples, None, group=group)


def test_gdpo_by_hand():
  result = combine_by_group(
    {"a": 1.0, "b": 0.5}, 2, a=[0.0, 1.0, 1.0, 1.0], b=[0.0, 4.0, 8.0, 2.0]
  )
  h = 1 / np.sqrt(2)
  sums = np.array([-h - 0.5 * h, h + 0.5 * h, 0.5 * h, -0.5 * h])
  deviation = np.sqrt((2 * (1.5 * h) ** 2 + 2 * (0.5 * h) ** 2) / 3)
  np.testing.assert_allclose(result.scores, sums / deviation, rtol=1e-3)
  np.testing.assert_allclose(
    result.weighted["a"], np.array([-h, h, 0, 0]) / deviation, rtol=1e-3
  )
  np.testing.assert_allclose(result.raw["b"], [0, 4, 8, 2])


def test_gdpo_equals_a_loop_over_valid_responses():
  rng, group = np.random.default_rng(0), 4
  values = {"a": rng.normal(3, 5, 24), "b": rng.normal(0, 0.1, 24)}
  values["a"][[2, 9]] = np.nan
  values["b"][9] = np.nan
  weights = {"a": 0.3, "b": 2.0}
  result = combine_by_group(weights, group, **{k: list(x) for k, x in values.items()})
  sums = np.zeros(24)
  for name, own in values.items():
    for start in range(0, 24, group):
      rows = own[start : start + group]
      known = rows[~np.isnan(rows)]
      normal = (rows - known.mean()) / (known.std(ddof=1) + 1e-4)
      sums[start : start + group] += weights[name] * normal
  valid = ~np.isnan(sums)
  want = (sums - sums[valid].mean()) / (sums[valid].std(ddof=1) + 1e-4)
  np.testing.assert_array_equal(result.valid, valid)
  np.testing.assert_allclose(result.scores, want, rtol=1e-9)
  parts = sum(result.weighted.values())
  np.testing.assert_allclose(parts[valid], want[valid], rtol=1e-9)
  np.testing.assert_allclose(result.scores[valid].mean(), 0, atol=1e-9)
  np.testing.assert_allclose(result.scores[valid].std(ddof=1), 1, rtol=1e-3)


def test_gdpo_has_no_scores_for_ties_alone():
  result = combine_by_group({"a": 1.0}, 2, a=[0.1, 0.1, 0.3, 0.3])
  np.testing.assert_allclose(result.scores, 0, atol=1e-9)


def test_more_invalid_samples_than_allowed_end_a_run_with_the_first_traceback():
  config = section(broken={})
  config.max_invalid = 0.5
  terms = [scorer.Term("broken", 1.0, fail)]
  result = scorer.score_samples(config, terms, SAMPLES, None)
  with pytest.raises(UserError) as error:
    scorer.raise_if_invalid(config, SAMPLES, result)
  message = str(error.value)
  assert "4 of 4 samples have no score (broken 4), of the records a, b;" in message
  assert "--config.reward.max_invalid=0.5" in message
  assert "ValueError: it is broken" in message
  one_valid = result._replace(valid=np.arange(4) == 2)
  config.max_invalid = 1.0
  line = scorer.raise_if_invalid(config, SAMPLES, one_valid)
  assert line.startswith("reward: 3 of 4")
  with pytest.raises(UserError):  # Nothing is left to learn from.
    scorer.raise_if_invalid(config, SAMPLES, result)


def fail(samples):
  raise ValueError("it is broken")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"combine": "product"}, "reward.combine must be one of sum, group, not 'product'"),
    ({"concurrency": 0}, "reward.concurrency must be 1 or more"),
    ({"terms.stop.fn": "halt"}, "reward.terms.stop.fn must be .* not 'halt'"),
    ({"terms.stop.scale": 1}, "reward.terms.stop.scale is no setting of a term"),
    ({"terms.stop.fn": "judge"}, "reward.terms.stop.kwargs.url must be like"),
    ({"terms.stop.kwargs": {"a": 1}}, "reward.terms.stop.fn='stop': it must accept"),
    (
      {"terms.stop.weight": 0.0, "terms.reward_model.weight": 0.0},
      "reward.terms has no term with a weight",
    ),
  ],
)
def test_wrong_settings_are_named(changes, message):
  config = scorer.default_config()
  for key, value in changes.items():
    place, _, name = key.rpartition(".")
    node = config
    for part in filter(None, place.split(".")):
      node = node[part]
    node[name] = value
  with pytest.raises(UserError, match=f"--config.{message}"), user_errors("reward"):
    scorer.check(config)
