"""What a rollout on servers checks and retries; tests/engine has a real server."""

import base64
import collections
import io
import json
import threading
import time

import jax
import numpy as np
import pytest
import torch
from pytest_httpserver import HTTPServer
from safetensors.numpy import load_file
from werkzeug import Response

from tests.engine.policy import (
  NEW,
  PAD,
  ROWS,
  SAMPLES,
  load,
  make_sampler,
  prompts,
  sample,
)
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.interrupts import Stopped
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.runtime import resume_policy
from vlmrlaif_jax.stages.training import rollout_settings, server_sampler

FACTOR = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
TOKENS = [[7, 9, 2], [8] * NEW, [2], [5, 2]]  # Of each sample.


class Engine:
  """A server that answers as vLLM does, with responses that depend on the prompt."""

  def __init__(self, server: HTTPServer):
    self.server, self.url = server, server.url_for("/v1")
    self.adapters, self.requests = {}, collections.Counter()  # Tensors by name.
    self.models = collections.Counter()  # Completions by adapter.
    self.gate, self.waiting = threading.Event(), 0  # Requests wait while it is clear.
    self.gate.set()
    self.lock = threading.Lock()
    self.failures = []  # Statuses of the next completions.
    self.loads = self.returns_ids = True
    for name, answer in (
      ("load_lora_adapter", self.load),
      ("unload_lora_adapter", self.unload),
      ("completions", self.complete),
    ):
      server.expect_request(f"/v1/{name}").respond_with_handler(answer)

  def load(self, request):
    self.requests["load"] += 1
    given = request.get_json()
    if not self.loads:
      return Response("{}", 404)
    if given["lora_name"] in self.adapters and not given["load_inplace"]:
      return Response(json.dumps({"message": "already loaded"}), 400)
    tensors = load_file(given["lora_path"] + "/adapter_model.safetensors")
    self.adapters[given["lora_name"]] = self.tensors = tensors
    return Response("loaded")

  def unload(self, request):
    self.requests["unload"] += 1
    del self.adapters[request.get_json()["lora_name"]]
    return Response("unloaded")

  def complete(self, request):
    given = request.get_json()
    if self.failures:
      status = self.failures.pop()
      if status == 404:  # It has restarted.
        self.adapters.clear()
      return Response(json.dumps({"error": {"message": "refused"}}), status)
    if given["model"] not in self.adapters:
      return Response("{}", 404)
    with self.lock:
      self.waiting += 1
    self.gate.wait(60)
    with self.lock:
      self.waiting -= 1
      self.requests["completions"] += 1
      self.models[given["model"]] += 1
    rows = torch.load(io.BytesIO(base64.b64decode(given["prompt_embeds"])))
    choices = [
      {
        "index": i,
        "token_ids": [len(rows) if t == 9 else t for t in tokens],
        "logprobs": {"token_logprobs": [-0.5 * (i + 1)] * len(tokens)},
      }
      for i, tokens in enumerate(TOKENS)
    ]
    if not self.returns_ids:  # As an older server.
      choices = [{"index": 0, "logprobs": None}]
    return Response(json.dumps({"choices": choices[::-1]}))


@pytest.fixture
def engine():
  with HTTPServer(threaded=True) as server:
    yield Engine(server)


def test_responses_are_in_order_after_their_prompts(engine, tmp_path):
  sampled = sample(make_sampler(tmp_path, engine.url))
  start = sampled.batch.tokens.shape[1] - NEW
  tokens = np.asarray(sampled.batch.tokens)[:, start:]
  for i, row in enumerate(ROWS):
    length = start - 4 + len(row)  # Of the prompt, without padding.
    for j, given in enumerate(TOKENS):
      want = [length if t == 9 else t for t in given]
      got = tokens[i * SAMPLES + j]
      assert got.tolist() == want + [PAD] * (NEW - len(want))
      mask = np.asarray(sampled.batch.loss_mask)[i * SAMPLES + j, start:]
      assert mask.sum() == len(want)
      logps = np.asarray(sampled.logps)[i * SAMPLES + j, start:]
      np.testing.assert_array_equal(logps, np.where(mask, -0.5 * (j + 1), 0))


def test_the_adapter_has_the_trained_factors_and_is_removed(engine, tmp_path):
  sample(make_sampler(tmp_path, engine.url))
  lora = load()[1]["policy"]["lora"]["llm"]["blocks"]["q"]
  np.testing.assert_array_equal(engine.tensors[FACTOR], np.asarray(lora["a"][2]).T)
  assert engine.requests == {"load": 1, "completions": len(ROWS), "unload": 1}
  assert not engine.adapters and not list((tmp_path / "adapters").iterdir())


def test_rollouts_in_flight_have_adapters_of_their_own(engine, tmp_path):
  sampler, (model, params, frozen) = make_sampler(tmp_path, engine.url), load()
  engine.gate.clear()  # No response arrives.
  begin = lambda scale: sampler.begin(
    jax.random.key(scale),
    jax.tree.map(lambda x: scale * x, params),
    frozen,
    prompts(model),
  )
  pending = [begin(scale) for scale in (1, 2)]
  wait_until(lambda: engine.waiting == 2 * len(ROWS))
  first, second = sorted(engine.adapters)
  assert set(engine.adapters) == {x.name for x in (tmp_path / "adapters").iterdir()}
  lora = params["policy"]["lora"]["llm"]["blocks"]["q"]["a"]
  for name, scale in ((first, 1), (second, 2)):
    sent = engine.adapters[name][FACTOR]
    np.testing.assert_array_equal(sent, scale * np.asarray(lora[2]).T)
  engine.gate.set()
  for each in pending:
    assert sampler.finish(each).batch.tokens.shape[0] == len(ROWS) * SAMPLES
  assert engine.models == {first: len(ROWS), second: len(ROWS)}
  assert not engine.adapters and not list((tmp_path / "adapters").iterdir())


def test_rollouts_in_flight_share_the_limit_of_requests(engine, tmp_path):
  sampler, (model, params, frozen) = (
    make_sampler(tmp_path, engine.url, concurrency=2),
    load(),
  )
  engine.gate.clear()
  rows = prompts(model)
  pending = [sampler.begin(jax.random.key(i), params, frozen, rows) for i in range(2)]
  wait_until(lambda: engine.waiting == 2)
  time.sleep(0.2)
  assert engine.waiting == 2
  engine.gate.set()
  for each in pending:
    sampler.finish(each)
  assert engine.requests["completions"] == 2 * len(ROWS)


def wait_until(is_true):
  for _ in range(1000):
    if is_true():
      return
    time.sleep(0.01)
  pytest.fail("it did not become true in 10 s")


@pytest.mark.parametrize("status", [404, 500, 503])
def test_a_failure_is_repeated_with_the_adapter_loaded_again(engine, tmp_path, status):
  engine.failures = [status]
  sampled = sample(make_sampler(tmp_path, engine.url))
  assert engine.requests["load"] == 2
  assert sampled.batch.tokens.shape[0] == len(ROWS) * SAMPLES


def test_prompts_of_a_dead_server_go_to_the_others(engine, tmp_path):
  dead = "http://127.0.0.1:9/v1"
  sampler = make_sampler(tmp_path, dead, engine.url)
  assert sample(sampler).batch.tokens.shape[0] == len(ROWS) * SAMPLES
  assert engine.requests["completions"] == len(ROWS)


def test_what_a_server_rejects_ends_the_run_with_its_reason(engine, tmp_path):
  engine.failures = [400] * 9
  with pytest.raises(UserError, match="http 400: refused"):
    sample(make_sampler(tmp_path, engine.url))


@pytest.mark.parametrize(
  "missing, error",
  [("loads", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"), ("returns_ids", "token_ids")],
)
def test_a_server_without_a_required_feature_is_named(engine, tmp_path, missing, error):
  setattr(engine, missing, False)
  with pytest.raises(UserError, match=f"{engine.url} .*{error}"):
    sample(make_sampler(tmp_path, engine.url))


def test_the_run_stops_when_no_server_replies(tmp_path):
  sampler = make_sampler(tmp_path, "http://127.0.0.1:9/v1", patience_s=0.1)
  with pytest.raises(Stopped, match="no server of rollout.urls has replied for 0.1 s"):
    sample(sampler)


@pytest.mark.parametrize(
  "values, error",
  [
    (dict(engine="sglang"), "engine"),
    (dict(urls=()), "urls"),
    (dict(urls=("127.0.0.1:8000",)), "urls"),
    (dict(urls=("http://10.0.0.1:8000/v1",)), "allow_remote=True"),
    (dict(urls=("http://localhost.example/v1",)), "allow_remote=True"),
    (dict(concurrency=0), "concurrency"),
    (dict(max_staleness=-1), "max_staleness"),
  ],
)
def test_invalid_settings_are_named(values, error):
  config = rollout_settings.default_config()
  config.update({"engine": "vllm", **values})
  with pytest.raises(ValueError, match=error):
    rollout_settings.check(config)


def test_any_address_of_this_machine_is_accepted():
  config = rollout_settings.default_config()
  hosts = ("localhost", "127.0.0.1", "127.0.0.2", "[::1]")
  config.update(engine="vllm", urls=tuple(f"http://{host}:8000/v1" for host in hosts))
  rollout_settings.check(config)


def test_another_address_is_used_if_the_user_allows_it():
  config = rollout_settings.default_config()
  config.update(engine="vllm", urls=("http://10.0.0.1/v1",), allow_remote=True)
  rollout_settings.check(config)


def test_servers_may_change_when_a_run_is_resumed():
  config = rollout_settings.default_config()
  fixed = resume_policy.select_fixed_settings(config, "grpo.rollout")
  assert fixed == {"grpo.rollout.engine": "jax", "grpo.rollout.max_staleness": 0}


def test_positions_with_axes_are_refused():
  llm = llama.Model(**llama.VARIANTS["tiny"], mrope=(2, 1, 1))
  with pytest.raises(UserError, match="rollout.engine=jax"):
    server_sampler.check_servable(VLM(load()[0].vision, load()[0].projector, llm))
