"""Terms of servers, on servers of this machine."""

import json

import pytest
from ml_collections import ConfigDict
from werkzeug import Response

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.terms import scorer, servers
from vlmrlaif_jax.feedback.terms.functions import Outcome

SOURCES = servers.JudgeSources(endpoint.default_config())
SAMPLES = [
  sample(id="a", response="yes", record={"level": 3}, video=()),
  sample(id="b", response="no", video=()),
  sample(id="c", response="hm", video=()),
]


def score(cache, **term):
  config = scorer.default_config()
  config.terms = ConfigDict({"served": term})
  scorer.check(config)
  terms = scorer.load_terms(config, cache)
  return scorer.score_samples(config, terms, SAMPLES, None)


def test_a_judge_scores_from_0_to_1_and_is_asked_once(chat, tmp_path):
  chat.judge = lambda prompt: {"yes": '{"score": 8}', "no": "Score: 2"}.get(
    prompt.split("Response: ")[1].split("\n")[0], "I cannot tell."
  )
  settings = dict(url=chat.url, model="m", key_env="", retries=0)
  for _ in range(2):
    result = score(tmp_path / "replies.jsonl", fn="judge", kwargs=settings)
    assert result.raw["served"].tolist()[:2] == [0.8, 0.2]
    assert result.valid.tolist() == [True, True, False]
  assert len(chat.requests) == 3


def test_a_prompt_of_a_judge_reads_the_record(chat):
  chat.judge = lambda prompt: prompt
  settings = dict(
    url=chat.url, model="m", key_env="", prompt="Score: {record[level]} ({response})"
  )
  term = servers.make_judge_term(settings, SOURCES)
  assert term(SAMPLES[:1]) == [Outcome(0.3)]


def test_a_judge_without_a_place_for_the_response_is_named():
  settings = dict(url="http://localhost/v1", model="m", key_env="", prompt="Score?")
  with pytest.raises(ValueError, match="kwargs.prompt must contain {response}"):
    servers.read_judge_settings(settings, SOURCES.server)
  with pytest.raises(ValueError, match="kwargs.modell must be one of"):
    servers.read_judge_settings({"modell": "m"}, SOURCES.server)


def test_a_reward_server_gets_each_sample(httpserver, tmp_path):
  requests = []

  def respond(request):
    requests.append(request.json)
    if request.json["response"] == "hm":
      return Response("busy", 503)
    return Response(json.dumps({"score": len(request.json["response"])}))

  httpserver.expect_request("/score").respond_with_handler(respond)
  settings = {"url": httpserver.url_for("/score")}
  result = score(tmp_path / "replies.jsonl", fn="endpoint", kwargs=settings)
  assert result.raw["served"].tolist()[:2] == [3, 2]
  assert "503" in result.failures["served"] and not result.valid[2]
  [first] = [each for each in requests if each["id"] == "a"]
  assert first["record"] == {"level": 3} and first["answer"] == "A dog."
