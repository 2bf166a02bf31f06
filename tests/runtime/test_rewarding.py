"""Samples of a run, and the scores of its texts."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering, rewarding, role_params, scoring


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


def test_candidates_of_a_question_are_ranked_as_a_group(one, example, monkeypatch):
  def rank(run, variables, queries, sampling, *, seed):
    order = "[2, 1]" if "[1] Red." in queries[0].prompt else "[1, 2]"
    return [[answering.VideoReply(order, True)] for _ in queries]

  monkeypatch.setattr(answering, "answer_requests", rank)
  config = one.config.copy_and_resolve_references()
  config.reward.terms = ConfigDict({"rank": {"kwargs": {"judge": "self"}}})
  score = rewarding.make_text_scorer(one._replace(config=config))
  other = {**example, "id": "other"}
  examples, texts = [example, example, other], ["Red.", "Blue.", "Red."]
  result = score(one, examples, texts, [True] * 3)
  np.testing.assert_array_equal(result.raw["rank"], [0, 1, np.nan])
  assert "has one response" in result.failures["rank"]


def test_the_policy_judges_what_fits_and_the_setting_is_named(one, example, capsys):
  config = one.config.copy_and_resolve_references().reward
  config.self_judge.update(prompt_len=64, max_new=3, batch=2)
  ask = rewarding.make_self_judge(one, config)
  texts = ["Is it red?", "Is it red? " * 40, "Is it red?", "Is it blue?"]
  queries = [JudgeQuery(f"{i}", example["video"], t) for i, t in enumerate(texts)]
  first, too_long, again, other = ask(queries)
  assert too_long is None and first == again
  assert isinstance(first, str) and isinstance(other, str)
  line = "1 of 3 prompts of the judge are longer than --config.reward.self_judge.prompt"
  assert line in capsys.readouterr().out


def test_the_policy_is_loaded_for_a_term_that_it_judges(one, monkeypatch):
  config = one.config.copy_and_resolve_references().reward
  loaded = []
  monkeypatch.setattr(
    rewarding.role_params, "load_judge", lambda run, n: loaded.append(n)
  )
  rewarding.load_reward_terms(one, config, one.workdir / "endpoint.jsonl")
  assert loaded == []
  config.terms.rank = {"kwargs": {"judge": "self"}}
  rewarding.load_reward_terms(one, config, one.workdir / "endpoint.jsonl")
  assert loaded == ["sft"]
