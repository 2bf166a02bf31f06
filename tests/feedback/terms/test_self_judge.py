"""Terms that the SFT policy judges: a function in place of the policy."""

import pytest
from ml_collections import ConfigDict

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.core.errors import UserError, user_errors
from vlmrlaif_jax.feedback.terms import scorer

SAMPLES = [sample(response="A dog."), sample(response="A cat runs.")]


def reply(prompt):
  """Prefers dogs in all ways in which a term may request it; None is too long."""
  if "runs" in prompt and "Rate the response" in prompt:
    return None
  if "Rank them" in prompt:
    return "[1, 2]"
  if prompt.startswith(("List", "Write at most", "Turn")):
    return "- dog"
  return '{"score": 9}' if "Rate the response" in prompt else "Yes."


def section(**terms):
  config = scorer.default_config()
  config.terms = ConfigDict(
    {name: {"kwargs": {"judge": "self", **own}} for name, own in terms.items()}
  )
  return config


@pytest.mark.parametrize(
  ("name", "values"),
  [("judge", [0.9, None]), ("claims", [1, 1]), ("rubric", [1, 1]), ("rank", [1, 0])],
)
def test_the_policy_receives_each_query_with_its_video(name, values):
  queries = []

  def ask(asked):
    queries.extend(asked)
    return [reply(query.prompt) for query in asked]

  config = section(**{name: {"style": "brief"} if name == "claims" else {}})
  scorer.check(config)
  assert scorer.has_self_judge(config)
  terms = scorer.load_terms(config, None, ask)
  result = scorer.score_samples(config, terms, SAMPLES, None)
  found = zip(result.raw[name].tolist(), result.valid, strict=True)
  assert [value if valid else None for value, valid in found] == values
  assert queries and {query.video for query in queries} == {"v.mp4"}


def test_no_policy_is_needed_without_such_a_term():
  assert not scorer.has_self_judge(scorer.default_config())
  config = section(judge={})
  config.terms.judge.weight = 0.0
  assert not scorer.has_self_judge(config)


@pytest.mark.parametrize(
  ("terms", "message"),
  [
    ({"judge": {"judge": "me"}}, "terms.judge.kwargs.judge must be one of"),
    ({"claims": {"judge": "me"}}, "terms.claims.kwargs.judge must be .* truth, not"),
    ({"rank": {"sees_video": False}}, "terms.rank.kwargs.sees_video=False requires"),
  ],
)
def test_wrong_judges_are_named(terms, message):
  with pytest.raises(UserError, match=f"reward.{message}"), user_errors("reward"):
    scorer.check(section(**terms))


def test_the_lengths_of_the_policy_are_checked():
  config = section(judge={})
  config.self_judge.max_new = 0
  with pytest.raises(ValueError, match="self_judge.max_new must be 1 or more"):
    scorer.check(config)
