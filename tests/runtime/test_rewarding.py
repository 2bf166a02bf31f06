"""Samples of a run, and the scores of its texts."""

import numpy as np
import pytest

from vlmrlaif_jax.runtime import rewarding, role_params, scoring


@pytest.fixture(scope="module")
def example(one):
  return {**one.splits.prompts[0], "answer": "Red.", "fields": {"level": 3}}


def test_a_sample_has_the_record_and_frames_with_times(one, example):
  sample = rewarding.make_sample(one, example, "Red.", [5, one.stops[0]], True)
  assert sample.record["level"] == 3 and sample.record["source"] == example["source"]
  assert "fields" not in sample.record
  assert (sample.answer, sample.stopped, sample.max_tokens) == ("Red.", True, 48)
  assert sample.seed == rewarding.make_sample(one, example, "Red.", [], False).seed
  [frames] = sample.read_frames(count=3)
  assert len(frames.pixels) == 3 and frames.seconds[0] == 0 < frames.seconds[2]


def test_texts_are_scored_by_the_terms_of_training(one, example):
  texts, stopped = ["Red.", "Blue."], [True, False]
  score = rewarding.make_text_scorer(one)
  result = score(one, [example] * 2, texts, stopped)
  variables = role_params.load_reward_model(one)
  alone = scoring.score_texts(one, variables, [example] * 2, texts)
  np.testing.assert_allclose(result.scores, alone - [0, 1], rtol=1e-5)
  assert result.valid.all()
  config = one.config.copy_and_resolve_references()
  config.reward.terms.reward_model.weight = 0.0
  config.reward.terms.exact_match = {"weight": 2.0}
  score = rewarding.make_text_scorer(one._replace(config=config))
  assert score(one, [example] * 2, texts, stopped).scores.tolist() == [2, -1]
