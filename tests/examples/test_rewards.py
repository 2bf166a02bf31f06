"""The examples of terms, on servers of this machine."""

import json
import pathlib

import pytest
from werkzeug import Response

from tests.feedback import chat_server
from tests.feedback.terms.samples import sample
from vlmrlaif_jax.feedback.terms import functions

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "rewards"
SAMPLES = [sample(id=text, response=text) for text in ("short", "long " * 24, "none")]


def values(name, **kwargs):
  function = functions.load_function(str(FOLDER / name), {})
  function = functions.bind_arguments(function, name, kwargs)
  limits = functions.Limits(concurrency=4, timeout_s=20.0)
  return [each.value for each in functions.call_function(function, SAMPLES, limits)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def test_brevity_prefers_short_responses():
  assert values("brevity.py:score_brevity", words=12) == [1, 0.5, 1]


def test_a_judge_scores_each_response(httpserver):
  chat = chat_server.Chat(httpserver)
  read = lambda request: request.json["messages"][0]["content"].split("Response: ")[1]
  scores = {"short": '{"score": 8}', "none": "I cannot judge this."}
  chat.always = lambda chat, request: Response(
    chat_server.completion(scores.get(read(request), '{"score": 2}'))
  )
  found = values("judge.py:score_helpfulness", url=chat.url, model="m")
  assert found == [0.8, 0.2, None]


def test_a_server_scores_each_response(httpserver):
  def respond(request):
    if request.json["response"] == "none":
      return Response("busy", 503)
    return Response(json.dumps({"score": len(request.json["response"]) / 10}))

  httpserver.expect_request("/score").respond_with_handler(respond)
  url = httpserver.url_for("/score")
  assert values("reward_server.py:request_scores", url=url) == [0.5, 12.0, None]
