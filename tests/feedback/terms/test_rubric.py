"""The term `rubric`, on a server of this machine."""

import pytest
from ml_collections import ConfigDict

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.terms import rubric, scorer
from vlmrlaif_jax.feedback.terms.rubric import Criterion

WRONG = [{"weight": 0}, {"regex": 3}, {"criterion": 1}, {"text": "a"}]


def reply(prompt):
  """Writes two criteria, and accepts those whose text is in the response."""
  if "Write at most five criteria" in prompt:
    return "Sure!\n- dog\n- red" if "What?" in prompt else ""
  response, criterion = prompt.split("Response: ")[1].split("\nCriterion: ")
  if response == "hm":
    return "Maybe."
  return "Yes." if criterion in response else "No."


@pytest.fixture
def chat(chat):
  chat.judge = reply
  return chat


def score(chat, cache, samples):
  settings = dict(url=chat.url, model="m", key_env="", retries=0)
  config = scorer.default_config()
  config.terms = ConfigDict({"rubric": {"kwargs": settings}})
  terms = scorer.load_terms(config, cache / "replies.jsonl")
  return scorer.score_samples(config, terms, samples, None)


def test_the_value_is_the_weighted_share_of_the_criteria_met(chat, tmp_path):
  weighed = {"rubric": [{"criterion": "dog", "weight": 3}, {"criterion": "red"}]}
  samples = [
    sample(response="A dog.", record=weighed, video=()),
    sample(response="red", record={"rubric": ["dog", "red"]}, video=()),
    sample(response="hm", record=weighed, video=()),
    sample(response="A dog.", record={"rubric": "dog"}, video=()),
  ]
  result = score(chat, tmp_path, samples)
  assert result.raw["rubric"].tolist()[:2] == [0.75, 0.5]
  assert result.valid.tolist() == [True, True, False, False]
  assert "no yes or no on 'dog'" in result.failures["rubric"]


def test_the_judge_writes_missing_criteria_once(chat, tmp_path):
  samples = [sample(response=text, video=()) for text in ("A dog.", "A red dog.")]
  for _ in range(2):
    assert score(chat, tmp_path, samples).scores.tolist() == [0.5, 1]
  assert len(chat.requests) == 1 + 4
  result = score(chat, tmp_path, [sample(prompt="Who?", video=())])
  assert result.failures["rubric"] == "the judge wrote no readable criteria"


def test_a_criterion_with_a_pattern_takes_no_query(chat, tmp_path):
  ends = {"criterion": "Ends with a period.", "regex": r"\.$", "weight": 3}
  samples = [
    sample(response="A dog.", record={"rubric": [ends, "red"]}, video=()),
    sample(response="red", record={"rubric": [ends]}, video=()),
    sample(response="red", record={"rubric": [ends | {"regex": "("}]}, video=()),
  ]
  result = score(chat, tmp_path, samples)
  assert result.raw["rubric"].tolist()[:2] == [0.75, 0]
  assert not result.valid[2] and len(chat.requests) == 1
  assert "regular expression of Python, not '('" in result.failures["rubric"]


def test_a_rubric_has_texts_or_weighted_criteria():
  parsed = rubric.parse_rubric(["a", {"criterion": "b", "weight": 2, "regex": "b"}])
  assert parsed == [Criterion("a", 1.0), Criterion("b", 2.0, "b")]
  for wrong in ("a", [], [3], *([{"criterion": "a", **each}] for each in WRONG)):
    with pytest.raises(ValueError, match="rubric must "):
      rubric.parse_rubric(wrong)


def test_wrong_settings_of_a_rubric_are_named():
  with pytest.raises(ValueError, match="kwargs.modell must be one of"):
    rubric.read_rubric_settings({"modell": "m"}, endpoint.default_config())
