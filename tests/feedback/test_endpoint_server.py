"""The client against `transformers serve`, and a tiny LLaVA of random weights in it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from werkzeug import Response

from tests.feedback.chat_server import PATH
from tests.helpers import small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.interrupts import Stopped
from vlmrlaif_jax.feedback import endpoint, rankers
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.serving import export

PATCHES = 16  # Of an image, and as many tokens.


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
  """What `export` makes of a base: a LLaVA with its processor and chat template."""
  base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("judge")
  # The base's own template takes no images.
  ignored = shutil.ignore_patterns("chat_template.jinja")
  shutil.copytree(tiny_checkpoint, base, dirs_exist_ok=True, ignore=ignored)
  _, variables, config = convert.load_checkpoint(base, dtype="float32")
  # As they are made, features are so small that the reply is the same to all.
  variables["params"]["projector"]["linear_2"]["kernel"] *= 20
  model = small.config({"model.path": str(base)}).model
  variables = {**variables, "lora": {}}
  export.write_merged(folder, variables, config, base, model, "float32")
  return folder


@pytest.fixture(scope="module")
def process(tmp_path_factory):
  """(the server's process, its url). It loads what a query names as its model."""
  log = tmp_path_factory.mktemp("log") / "serve.log"
  command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
  command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
  env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
  with (
    log.open("w") as out,
    subprocess.Popen(command, stdout=out, stderr=out, env=env) as started,
  ):
    try:
      yield started, f"{_address(started, log)}/v1"
    finally:
      started.kill()


def _address(started, log):
  stop = time.monotonic() + 120
  while started.poll() is None and time.monotonic() < stop:
    if found := re.search(r"running on (\S+)", log.read_text()):
      return found[1]
    time.sleep(0.1)
  raise AssertionError(log.read_text())


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def front(process, httpserver):
  """A server that hands on to the real one, after what it is told to do before."""

  def hand_on(request):
    found = httpx.post(process[1] + "/chat/completions", json=request.json, timeout=60)
    kind = found.headers["Content-Type"]
    return Response(found.content, found.status_code, content_type=kind)

  httpserver.expect_request(PATH).respond_with_handler(hand_on)
  return httpserver


@pytest.fixture
def make(process, checkpoint, tmp_path):
  def make(**settings):
    config = endpoint.default_config()
    config.update(
      {"url": process[1], "model": str(checkpoint), "key_env": "", "frames": 3,
       "max_tokens": 6, "retries": 1, **settings}
    )  # fmt: skip
    return endpoint.Endpoint(config, tmp_path / "replies.jsonl")

  return make


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """Two, of three frames of large random squares."""
  rng, folders = np.random.default_rng(0), []
  for name in "ab":
    folders.append(tmp_path_factory.mktemp(name))
    for i in range(3):
      squares = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
      Image.fromarray(squares).resize((64, 64), 0).save(folders[-1] / f"{i}.png")
  return [str(folder) for folder in folders]


def test_replies_depend_on_the_frames(make, videos):
  judge = make()
  first, second = judge.ask(
    [JudgeQuery("id", video, "What is it?") for video in videos]
  )
  assert first and second and first != second
  assert judge.counts == {"asked": 2}


def test_replies_depend_on_the_turns_before(make, videos):
  histories = [(), (("Who?", "A red cat."),), (("Who?", "A blue dog."),)]
  replies = make().ask(
    [JudgeQuery("id", videos[0], "Why?", turns) for turns in histories]
  )
  assert None not in replies and len(set(replies)) == 3


def test_each_frame_is_an_image_to_the_model(front, make, videos):
  for frames in (1, 3):
    make(url=front.url_for("/v1"), frames=frames).ask(
      [JudgeQuery("id", videos[0], "Who?")]
    )
  one, three = (made.json["usage"]["prompt_tokens"] for _, made in front.log)
  assert three - one == 2 * (PATCHES + 1)  # And the end of a line.


def test_replies_to_many_at_once_are_those_to_each(make, videos, tmp_path):
  asked = [
    JudgeQuery("id", video, word) for video in videos for word in ("Who?", "Why?")
  ]
  at_once = make(concurrency=4).ask(asked)
  (tmp_path / "replies.jsonl").unlink()
  judge = make()
  assert at_once == [judge.ask([query])[0] for query in asked]
  assert judge.counts == {"asked": 4}


@pytest.mark.parametrize(
  ("status", "content"), [(429, "{}"), (500, "oops"), (200, '{"choices": [{"mess')]
)
def test_a_fault_before_the_reply_is_got_over(front, make, videos, status, content):
  query = JudgeQuery("id", videos[0], "Who?")
  front.expect_oneshot_request(PATH).respond_with_data(content, status)
  judge = make(url=front.url_for("/v1"))
  assert judge.ask([query]) == make().ask([query]) != [None]
  assert judge.counts == {"asked": 1} and len(front.log) == 2


def test_a_server_that_stalls_is_left_and_asked_again_later(process, make, videos):
  query = JudgeQuery("id", videos[0], "Who?")
  judge = make(timeout_s=0.3, retries=0)
  process[0].send_signal(signal.SIGSTOP)
  try:
    with pytest.raises(Stopped, match="timeout"):
      judge.ask([query])
  finally:
    process[0].send_signal(signal.SIGCONT)
  assert judge.counts == {"asked": 1, "failed: timeout": 1}
  assert make().ask([query]) != [None]


def test_a_retry_gets_to_a_server_that_hangs_up_after_a_fault(make, videos):
  judge = make(model="not-there")
  with pytest.raises(Stopped, match="http 500"):
    judge.ask([JudgeQuery("id", videos[0], "Who?")])
  assert judge.counts == {"asked": 1, "failed: http 500": 1}


def test_a_setting_that_the_server_does_not_know_is_said(make, videos):
  judge = make(length_field="longest")
  with pytest.raises(UserError, match="http 422.*'longest'"):
    judge.ask([JudgeQuery("id", videos[0], "Who?")])
  assert judge.counts == {"asked": 1, "failed: http 422": 1}


def test_an_address_that_the_server_does_not_have_is_said(process, make, videos):
  judge = make(url=process[1] + "/v2")
  with pytest.raises(UserError, match="http 404.*Check url"):
    judge.ask([JudgeQuery("id", videos[0], "Who?")])


def test_what_is_no_permutation_ranks_nothing(make, videos):
  example = {"id": "x", "video": videos[0], "question": "What does it do?"}
  judge = make()
  found = rankers.listwise_ranker(judge.ask)([example], [["It sits.", "It runs."]])
  assert judge.counts == {"asked": 1} and not found.valid.any()
