"""The client against a real server on this machine, which fails in every way it can."""

import base64
import io
import logging
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.feedback.chat_server import (
  Chat,
  completion,
  drips,
  hangs_up,
  sends,
  stalls,
  status,
)
from tests.helpers.numbered import read_numbers, write_numbered
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.interrupts import Stopped
from vlmrlaif_jax.data.templates import MEDIA_MARK
from vlmrlaif_jax.data.video import MediaList
from vlmrlaif_jax.feedback import endpoint, rankers
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery

KEY = "sk-very-secret"


@pytest.fixture
def server(http_server):
  chat = Chat(http_server)
  yield chat
  chat.closing.set()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", KEY)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def video(tmp_path):
  """Three frames of one colour each."""
  folder = tmp_path / "video"
  folder.mkdir()
  for i in range(3):
    Image.new("RGB", (64, 32), (100 * i, 0, 0)).save(folder / f"{i}.png")
  return str(folder)


@pytest.fixture
def make(server, tmp_path):
  def make(**settings):
    config = endpoint.default_config()
    config.update(
      {"url": server.url, "model": "judge-1", "key_env": "JUDGE_KEY", "frames": 3,
       "timeout_s": 5.0, "retries": 2, **settings}
    )  # fmt: skip
    return endpoint.Endpoint(config, tmp_path / "replies.jsonl")

  return make


def queries(video, *prompts):
  return [JudgeQuery(f"id{i}", video, prompt) for i, prompt in enumerate(prompts)]


# What is sent.


def test_request_is_a_chat_completion_with_frames(server, make, video):
  assert make(side=32).ask(queries(video, "Which?")) == ["re: Which?"]
  [(headers, body)] = server.requests
  assert headers["Authorization"] == f"Bearer {KEY}"
  assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0, 256)
  [message] = body["messages"]
  *images, text = message["content"]
  assert message["role"] == "user" and text == {"type": "text", "text": "Which?"}
  head, coded = zip(*(i["image_url"]["url"].split(",") for i in images), strict=True)
  assert set(head) == {"data:image/jpeg;base64"}
  frames = [Image.open(io.BytesIO(base64.b64decode(data))) for data in coded]
  assert [frame.size for frame in frames] == [(32, 16)] * 3
  reds = [np.asarray(frame)[..., 0].mean() for frame in frames]
  np.testing.assert_allclose(reds, [0, 100, 200], atol=4)


def test_a_judge_is_shown_the_part_that_a_name_ends_in(server, make, tmp_path):
  path = write_numbered(tmp_path / "clip.mp4")
  make().ask(queries(f"{path}#t=0.4,1.2", "Which?"))
  *images, _ = server.requests[0][1]["messages"][0]["content"]
  coded = [image["image_url"]["url"].split(",")[1] for image in images]
  frames = [Image.open(io.BytesIO(base64.b64decode(data))) for data in coded]
  assert read_numbers([np.asarray(frame) for frame in frames]) == [10, 20, 30]


def test_a_judge_that_is_shown_nothing_gets_text_alone(server, make):
  assert make().ask([JudgeQuery("q", (), "Which?")]) == ["re: Which?"]
  [part] = server.requests[0][1]["messages"][0]["content"]
  assert part == {"type": "text", "text": "Which?"}


def test_a_server_without_a_key_gets_none(server, make, video):
  make(key_env="").ask(queries(video, "Which?"))
  assert "Authorization" not in server.requests[0][0]


def test_length_is_asked_for_by_the_name_the_server_knows(server, make, video):
  make(length_field="max_completion_tokens").ask(queries(video, "Which?"))
  body = server.requests[0][1]
  assert body["max_completion_tokens"] == 256 and "max_tokens" not in body


def test_a_server_that_takes_no_temperature_gets_none(server, make, video):
  make(temperature=-1.0).ask(queries(video, "Which?"))
  assert "temperature" not in server.requests[0][1]


def test_earlier_turns_are_messages_and_the_frames_are_in_the_first(
  server, make, video
):
  turns = (("Who?", "Ann."), ("Where?", "Here."))
  assert make().ask([JudgeQuery("id", video, "When?", turns)]) == ["re: When?"]
  first, *later = server.requests[0][1]["messages"]
  kinds = [part["type"] for part in first["content"]]
  assert first["role"] == "user" and first["content"][-1]["text"] == "Who?"
  assert kinds == ["image_url"] * 3 + ["text"]
  assert [(m["role"], *(p["text"] for p in m["content"])) for m in later] == [
    ("assistant", "Ann."),
    ("user", "Where?"),
    ("assistant", "Here."),
    ("user", "When?"),
  ]


def test_frames_of_several_videos_are_at_their_marks(server, make, video, tmp_path):
  Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
  both, mark = MediaList((video, str(tmp_path / "image.png"))), MEDIA_MARK
  talks = [
    JudgeQuery("0", both, "Which?"),
    JudgeQuery("1", both, f"And {mark}?", ((f"{mark}Who?", "Ann."),)),
    JudgeQuery("2", (), f"Is {mark} red?"),
  ]
  make(frames=2, concurrency=1).ask(talks)
  shorten = lambda part: part.get("text", "frame")
  sent = [
    [[shorten(part) for part in message["content"]] for message in body["messages"]]
    for _, body in server.requests
  ]
  assert sent == [
    [["frame"] * 4 + ["Which?"]],
    [["frame", "frame", "Who?"], ["Ann."], ["And ", "frame", "frame", "?"]],
    [["Is <video> red?"]],
  ]


def test_replies_stand_in_the_order_of_the_queries(server, make, video):
  def slow_first(prompt):
    time.sleep(0.1 if prompt == "0" else 0.0)
    return prompt

  server.judge = slow_first
  prompts = [str(i) for i in range(12)]
  assert make().ask(queries(video, *prompts)) == prompts


def test_no_more_requests_at_once_than_allowed(server, make, video):
  three = threading.Barrier(3)
  server.judge = lambda prompt: f"{three.wait(20)}"  # Of three requests at once.
  replies = make(concurrency=3).ask(queries(video, *map(str, range(15))))
  assert server.most == 3 and None not in replies


def test_the_same_query_twice_is_one_request(server, make, video):
  judge = make()
  assert judge.ask(queries(video, "a", "b", "a")) == ["re: a", "re: b", "re: a"]
  assert len(server.requests) == judge.counts["asked"] == 2


def test_half_a_character_loses_no_reply(server, make, video):
  server.judge = lambda prompt: "\ud83d"
  assert make().ask(queries(video, "\ud83d?")) == ["\ud83d"]
  assert make().ask(queries(video, "\ud83d?")) == ["\ud83d"]
  assert len(server.requests) == 1


# Faults.

PASSING = {
  "http 429": status(429),
  "http 500": status(500, b"<html>oops</html>"),
  "http 503": status(503),
  "timeout": stalls,
  "no connection": hangs_up,
  "malformed reply": sends(b'{"choices": [{"mess'),
}
MALFORMED = {
  "no JSON": b"",
  "no UTF-8": b'"\xff"',
  "no object": b"[]",
  "no choices": b'{"choices": []}',
  "an error": b'{"error": {"message": "overloaded"}}',
  "no content": completion(None),
  "parts": completion([{"type": "text", "text": "A"}]),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(server, make, video, fault):
  server.faults = [PASSING[fault]]
  judge = make(timeout_s=1.0 if fault == "timeout" else 5.0)
  assert judge.ask(queries(video, "a")) == ["re: a"]
  assert judge.counts == {"asked": 1} and len(server.requests) == 2


@pytest.mark.parametrize("fault", PASSING)
def test_what_stays_is_no_reply_and_counted(server, make, video, fault):
  server.faults = [PASSING[fault]] * 2
  judge = make(timeout_s=0.5 if fault == "timeout" else 5.0, retries=1, concurrency=1)
  assert judge.ask(queries(video, "a", "b")) == [None, "re: b"]
  assert judge.counts == {"asked": 2, f"failed: {fault}": 1}
  assert len(server.requests) == 3


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_completion_is_no_reply(server, make, video, content):
  server.faults = [sends(content)]
  judge = make(retries=0, concurrency=1)
  assert judge.ask(queries(video, "a", "b")) == [None, "re: b"]
  assert judge.counts["failed: malformed reply"] == 1


def test_a_server_that_drips_does_not_hold_us_up(server, make, video):
  server.always = drips
  judge, start = make(timeout_s=0.3, retries=0), time.monotonic()
  with pytest.raises(Stopped, match="timeout"):
    judge.ask(queries(video, "a"))
  assert time.monotonic() - start < 8  # The server would take 10.
  assert judge.counts["failed: timeout"] == 1


def test_a_query_that_is_refused_is_not_asked_again(server, make, video):
  server.faults = [status(400)]
  judge = make(concurrency=1)
  assert judge.ask(queries(video, "too long", "b")) == [None, "re: b"]
  assert judge.counts == {"asked": 2, "failed: http 400": 1}


def test_a_video_that_cannot_be_read_is_no_reply(server, make, video, tmp_path):
  judge = make()
  asked = queries(str(tmp_path / "none.mp4"), "a") + queries(video, "b")
  assert judge.ask(asked) == [None, "re: b"]
  assert judge.counts == {"failed: video": 1, "asked": 1}


def test_retries_wait_as_long_as_the_server_asks(server, make, video):
  server.faults = [status(429, Retry_After="1")]
  make().ask(queries(video, "a"))
  first, second = server.times
  assert 1.0 <= second - first < 20


def test_no_server_makes_us_wait_for_ever(server, make, video):
  server.always = status(429, Retry_After="3600")
  judge, start = make(retries=1), time.monotonic()
  with pytest.raises(Stopped, match="http 429"):
    judge.ask(queries(video, "a"))
  assert time.monotonic() - start < 30 and judge.counts["failed: http 429"] == 1


def test_a_list_that_is_no_permutation_fails_its_group_alone(server, make, video):
  server.judge = lambda prompt: "[2, 2]" if "cat" in prompt else "[2, 1]"
  example = lambda id: {"id": id, "video": video, "question": f"What does {id} do?"}
  judge = make()
  found = rankers.listwise_ranker(judge.ask)(
    [example("cat"), example("dog")], [["sits", "runs"], ["sits", "runs"]]
  )
  np.testing.assert_array_equal(found.valid, [[False] * 2, [True] * 2])
  np.testing.assert_array_equal(found.scores[1], [-1, 0])


# A server of no use.

IMAGES = b'{"error": {"message": "At most 1 image(s) may be\\nprovided."}}'


@pytest.mark.parametrize(
  ("fault", "said"),
  [
    (status(400, IMAGES), r"3 of 3 .*http 400: At most 1 image\(s\) may be provided"),
    (status(402), "http 402.*Add credit"),
    (status(413), "http 413.*Lower frames=3"),
    (status(422, b'{"detail": "no such field"}'), "422: no such field.*max_tokens=256"),
    (sends(completion(None)), "malformed reply.*raise max_tokens=256"),
  ],
)
def test_a_server_that_rejects_every_query_ends_the_run(
  server, make, video, fault, said
):
  server.always = fault
  with pytest.raises(UserError, match=said):
    make(retries=0).ask(queries(video, "a", "b", "c"))


@pytest.mark.parametrize("fault", [status(503), status(429), hangs_up])
def test_a_server_that_is_not_available_stops_the_run_resumably(
  server, make, video, fault
):
  judge = make(retries=0)
  judge.ask(queries(video, "a", "b"))
  server.always = fault  # It has replied, and dies.
  with pytest.raises(Stopped, match="failed 2 of 2 queries.*Replies so far are saved"):
    judge.ask(queries(video, "c", "d"))
  assert judge.counts["asked"] == 4


def test_a_server_that_is_not_there_stops_the_run_resumably(make, video):
  judge = make(url="http://127.0.0.1:9/v1", retries=1)
  with pytest.raises(Stopped, match="no connection.*Start the server, or correct url"):
    judge.ask(queries(video, "a"))


def test_a_batch_that_is_refused_by_a_server_that_has_replied_is_counted(
  server, make, video
):
  judge = make(retries=0)
  judge.ask(queries(video, "a"))
  server.always = status(400, IMAGES)
  assert judge.ask(queries(video, "too long")) == [None]
  assert judge.get_metrics() == {"failed_queries": 1.0, "failed_above_max": 0.9}


def test_the_first_failure_is_told_though_the_retry_succeeds(
  server, make, video, capsys
):
  server.faults = [status(500, b'{"error": "out of memory"}'), status(502)]
  make().ask(queries(video, "a"))
  lines = [x for x in capsys.readouterr().out.splitlines() if "first failure" in x]
  assert lines == [f"judge: first failure of {server.url}: http 500: out of memory"]


def test_failures_of_a_batch_are_told_with_their_reasons(server, make, video, capsys):
  server.faults = [status(400, IMAGES)]
  make(concurrency=1).ask(queries(video, *map(str, range(4))))
  assert (
    "judge: ALARM: 1 of 4 queries failed (1 http 400: At most 1 image(s) may be "
    "provided.); so far: asked 4, failed: http 400 1; more than "
    "endpoint.max_failed=0.1"
  ) in capsys.readouterr().out


def test_a_batch_without_failures_raises_no_alarm(server, make, video, capsys):
  judge = make()
  judge.ask(queries(video, "a"))
  assert judge.get_metrics() == {"failed_queries": 0.0, "failed_above_max": 0.0}
  assert capsys.readouterr().out == ""


# The cache.


def test_a_second_run_costs_nothing(server, make, video):
  first = make().ask(queries(video, "a", "b"))
  server.always = status(500)
  again = make()
  assert again.ask(queries(video, "a", "b")) == first == ["re: a", "re: b"]
  assert len(server.requests) == 2 and again.counts == {"cache": 2}


def test_a_disk_that_fails_costs_no_reply(server, make, video, tmp_path):
  judge = make()
  (tmp_path / "replies.jsonl").mkdir()  # A file of this name cannot be written.
  assert judge.ask(queries(video, "Which?")) == ["re: Which?"]
  assert judge.counts == {"asked": 1, "not saved": 1}


def test_a_failure_is_not_kept(server, make, video):
  server.faults = [status(400)]
  judge = make(concurrency=1)
  assert judge.ask(queries(video, "a", "b")) == [None, "re: b"]
  assert make().ask(queries(video, "a")) == ["re: a"]


@pytest.mark.parametrize(
  "settings", [{"model": "judge-2"}, {"temperature": 0.5}, {"side": 16}, {"frames": 2}]
)
def test_whatever_is_sent_is_in_the_key(server, make, video, settings):
  make().ask(queries(video, "a"))
  make(**settings).ask(queries(video, "a"))
  assert len(server.requests) == 2


def test_the_cache_tells_histories_apart(server, make, video):
  server.judge = lambda prompt: str(len(server.requests))
  histories = [(), (("Who?", "Ann."),), (("Who?", "Bob."),), (("Who?", "Ann."),) * 2]
  asked = [JudgeQuery("id", video, "When?", turns) for turns in histories]
  first = make(concurrency=1).ask(asked)
  assert first == ["1", "2", "3", "4"]
  assert make().ask(asked[::-1]) == first[::-1]
  assert len(server.requests) == 4


def test_a_video_goes_by_what_it_shows(server, make, video, tmp_path):
  make().ask(queries(video, "a"))
  (tmp_path / "video").rename(tmp_path / "moved")
  moved = str(tmp_path / "moved")
  make().ask(queries(moved, "a"))
  assert len(server.requests) == 1
  Image.new("RGB", (64, 32), (0, 0, 255)).save(tmp_path / "moved" / "1.png")
  make().ask(queries(moved, "a"))
  assert len(server.requests) == 2


# The key, and other settings.


def test_the_key_is_not_written_anywhere(server, make, video, tmp_path, caplog):
  caplog.set_level(logging.DEBUG)
  server.faults = [status(500, KEY.encode())]
  server.judge = lambda prompt: "fine"
  judge = make()
  judge.ask(queries(video, "a"))
  assert server.requests[0][0]["Authorization"].endswith(KEY)
  assert caplog.records and KEY not in caplog.text
  assert KEY not in repr(vars(judge)) + str(judge.counts)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert files and all(KEY.encode() not in path.read_bytes() for path in files)


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_is_wrong_for_every_query_is_said_at_once(server, make, video, code):
  server.always = status(code, f"bad key {KEY}".encode())
  named = "url=.*model" if code == 404 else "JUDGE_KEY"
  with pytest.raises(UserError, match=f"http {code}.*{named}") as error:
    make(concurrency=1).ask(queries(video, *map(str, range(200))))
  assert server.url in str(error.value) and KEY not in str(error.value)
  assert len(server.requests) < 100


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"key_env": "NOT_SET"}, "environment variable NOT_SET is not set"),
    ({"url": ""}, "url must be like .* got ''"),
    ({"url": "localhost:8000/v1"}, "url must be like"),
    ({"url": "http://me:pw@host/v1"}, "url must contain no user"),
    ({"url": "http://host/v1?key=pw"}, "url must contain no user"),
    ({"model": ""}, "model must be"),
    ({"concurrency": 0}, "concurrency must be 1 or more, not 0"),
  ],
)
def test_a_setting_of_no_use_is_refused(make, settings, said):
  with pytest.raises(ValueError, match=said) as error:
    make(**settings)
  assert "pw" not in str(error.value)


def test_a_redirect_is_refused_and_the_key_stays_here(server, make, video):
  server.always = status(307, Location=f"{server.url}/elsewhere")
  with pytest.raises(UserError, match="http 307.*Set url"):
    make().ask(queries(video, "a"))
  assert len(server.requests) == 1
