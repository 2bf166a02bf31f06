"""The term `claims`, by the truth of a scene and by a server of this machine."""

import pathlib

import pytest
from ml_collections import ConfigDict

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.data.world import scene
from vlmrlaif_jax.data.world.scene import Scene, SceneObject
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.terms import claims, scorer
from vlmrlaif_jax.feedback.terms.claims import ClaimCounts

RING = SceneObject("ring", "red", "small", "left", 42, 20, ())
SQUARE = SceneObject("square", "green", "large", "still", 50, 50)
SCENE = scene.scene_to_json(Scene((RING, SQUARE), background=30, bar=-1, seed=0))
RING_SAYS = "The small red ring moves left."
SQUARE_SAYS = "The large green square stays still."
NO_FILE = pathlib.Path("no_such_folder/replies.jsonl")


def described(response):
  truth = {"scene": SCENE, "kind": "description", "answer": ""}
  return sample(response=response, record={"truth": truth})


def answered(response):
  truth = {"scene": SCENE, "kind": "color", "answer": "It is red."}
  return sample(response=response, record={"truth": truth})


def score(samples, cache, kwargs, term="claims"):
  config = scorer.default_config()
  config.terms = ConfigDict({term: {"kwargs": kwargs}})
  terms = scorer.load_terms(config, cache)
  return scorer.score_samples(config, terms, samples, None)


def test_truth_counts_accepted_denied_and_missing_claims():
  samples = [
    described(f"{RING_SAYS} {SQUARE_SAYS}"),
    described(f"{RING_SAYS} {RING_SAYS}"),
    described("The small red ring moves up. It is fun."),
    described(""),
    answered("It is red."),
    answered("It is blue."),
    answered(""),
  ]
  want = [(8, 0, 0), (4, 0, 4), (3, 2, 5), (0, 0, 8), (1, 0, 0), (0, 1, 1), (0, 0, 1)]
  assert claims.count_true_claims(samples, has_missing=True) == want
  result = score(samples, NO_FILE, {"judge": "truth"})
  assert result.scores.tolist() == [1, 0.5, 0.1, 0, 1, -0.5, 0]
  result = score(samples, NO_FILE, {"judge": "truth", "missing": False})
  assert result.scores.tolist() == [1, 1, 0.2, 0, 1, -1, 0]
  # Half for the stated facts, and half for no other statement.
  result = score(samples, NO_FILE, {"judge": "truth"}, "rubric")
  assert result.scores.tolist() == [1, 0.75, 0.1875, 0.5, 1, 0, 0.5]


@pytest.mark.parametrize("term", ["claims", "rubric"])
def test_truth_has_no_value_for_another_record(term):
  samples = [sample(record={}), answered("It is red.")]
  result = score(samples, NO_FILE, {"judge": "truth"}, term)
  assert result.valid.tolist() == [False, True]
  assert "set kwargs.judge='endpoint'" in result.failures[term]


def reply(prompt):
  """Splits at full stops, accepts claims about dogs, and compares by words."""
  if prompt.startswith("List"):
    answer = prompt.rsplit("Answer: ", 1)[1]
    return "\n".join(part.strip() for part in answer.split(".") if part.strip())
  if prompt.startswith("Turn"):
    return "\n".join(f"Is it so: {line}?" for line in prompt.splitlines()[1:])
  if prompt.startswith("Does the text"):
    text, fact = prompt.rsplit("Text: ", 1)[1].split("\nFact: ")
    return "yes" if fact in text else "no"
  return "Perhaps." if "cat" in prompt else "Yes" if "dog" in prompt else "No."


@pytest.fixture
def chat(chat):
  chat.judge = reply
  return chat


def test_a_server_judges_each_claim_once(chat, tmp_path):
  answer = "A dog runs. A man waves."
  samples = [
    sample(response=text, answer=answer, video=())
    for text in ("A dog runs.", "A dog runs. A dog runs. A boat", "A cat", "")
  ]
  settings = dict(url=chat.url, model="m", key_env="", retries=0, style="brief")
  result = score(samples, tmp_path / "replies.jsonl", settings)
  # (1, 0, 1), (1, 1, 1), no verdict, (0, 0, 2)
  assert result.raw["claims"].tolist()[:2] == [0.5, 0]
  assert result.valid.tolist() == [True, True, False, True]
  assert result.scores[3] == 0
  assert "unanswered" in result.failures["claims"]
  count = len(chat.requests)
  # Splits of 3 responses and the reference, 3 rewrites, 3 checks, 2 facts in 4 texts.
  assert count == 4 + 3 + 3 + 8
  score(samples, tmp_path / "replies.jsonl", settings)
  assert len(chat.requests) == count
  settings["missing"] = False
  result = score(samples, tmp_path / "replies.jsonl", settings)
  assert result.raw["claims"].tolist()[:2] == [1, 0] and len(chat.requests) == count


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"judge": "me"}, "kwargs.judge must be one of endpoint, self, truth, not 'me'"),
    ({}, "kwargs.url must be like"),
    ({"judge": "truth", "stile": "paper"}, "kwargs.stile must be one of"),
  ],
)
def test_wrong_settings_of_claims_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    claims.read_claims_settings(kwargs, endpoint.default_config())


def test_a_response_without_claims_has_the_value_0():
  assert claims.compute_claim_value(ClaimCounts(0, 0, 0)) == 0
