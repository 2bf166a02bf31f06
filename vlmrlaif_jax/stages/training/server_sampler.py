"""Samples the responses of rollouts on servers that decode from prompt embeddings.

A server has the text model of the policy, which `launch/export.py --kind=decoder`
writes. Prompts are sent as embeddings, in which video features are already placed, so
the server has no preprocessing of its own. The policy's LoRA is sent before each
rollout as a PEFT adapter with a new name: a server that restarts, or that has cached an
older adapter, cannot answer for it. The API is that of vLLM.
"""

import asyncio
import base64
import concurrent.futures
import importlib.util
import io
import json
import pathlib
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import openai
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.interrupts import Stopped
from vlmrlaif_jax.core.types import Batch, Params, merge_params
from vlmrlaif_jax.feedback import http_client
from vlmrlaif_jax.feedback.server_failures import describe_error
from vlmrlaif_jax.huggingface import peft_adapters
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.models.vlm import VLM, encode_video
from vlmrlaif_jax.sampling.generate import SampledResponses, join_responses

LONGEST_WAIT_S = 5.0  # Longest wait before a server that failed is tried again.


def check_servable(model: VLM) -> None:
  """Checks that a server can decode a model from embeddings and plain positions.

  Raises:
    UserError: Its positions have several axes.
  """
  if model.llm.mrope:
    raise UserError(
      "rollout.engine=vllm requires a language model with plain positions, but those "
      "of this family have the axes time, height and width, which a request with "
      "embeddings cannot state: set rollout.engine=jax"
    )


class ServerSettings(NamedTuple):
  """Settings of sampling on servers; `generate` describes them."""

  max_new: int
  temperature: float
  top_p: float
  top_k: int
  samples: int
  stops: tuple[int, ...]
  pad: int
  vocab: int


class RowResponses(NamedTuple):
  """The responses to one prompt, as a server returns them."""

  tokens: list[list[int]]
  logps: list[list[float]]


class _Server:
  """A server as a rollout sees it: whether it has the adapter, and when it failed.

  Rollouts that are sampled concurrently share its slots.
  """

  def __init__(self, url: str, config: ConfigDict, slots: asyncio.Semaphore):
    self.url, self.adapter, self.retry_at, self.failures = url, "", 0.0, 0
    self.lock, self.slots = asyncio.Lock(), slots
    self.client = http_client.make_client(url, timeout_s=config.timeout_s)
    self.limit = lambda: http_client.limit_exchange(config.timeout_s)

  def note_failure(self) -> None:
    """Leaves the server alone for a time that doubles with each failure in turn."""
    self.adapter = ""  # It may have restarted.
    self.failures += 1
    self.retry_at = time.monotonic() + min(0.25 * 2**self.failures, LONGEST_WAIT_S)


class ServerSampler:
  """Samples responses on servers, with the weights of the role "policy".

  Several rollouts may be begun before the first is finished. Each has an adapter of its
  own, which is removed when all its responses have arrived.

  Args:
    config: Settings, see rollout_settings.default_config.
    policy: Model of the policy, whose text model the servers have.
    settings: Settings of sampling.
    folder: Folder of adapters, which the servers can read.

  Raises:
    UserError: There are several processes, the family is not supported, or torch is
      not installed.
  """

  def __init__(
    self,
    config: ConfigDict,
    policy: VLM,
    settings: ServerSettings,
    folder: pathlib.Path,
  ):
    if distributed.is_multiprocess():
      raise UserError(
        "rollout.engine=vllm runs in one process: set rollout.engine=jax, or start the "
        "run without --processes"
      )
    check_servable(policy)
    if importlib.util.find_spec("torch") is None:
      raise UserError(
        "rollout.engine=vllm requires torch, in whose format servers read embeddings: "
        "pip install torch"
      )
    self._config, self._policy, self._settings = config, policy, settings
    shutil.rmtree(folder, ignore_errors=True)  # Of a run that was killed.
    self._folder = folder.resolve()
    # Special tokens at the end of the vocabulary are not sampled.
    self._bias = {str(i): -100 for i in range(settings.vocab, policy.llm.vocab)}
    self._run, self._count = uuid.uuid4().hex[:8], 0
    self._slots = {url: asyncio.Semaphore(config.concurrency) for url in config.urls}
    self._loop = asyncio.new_event_loop()
    # A daemon, so that a run that ends does not wait for rollouts sampled ahead.
    threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True).start()

    @jax.jit
    def embed(params: Params, frozen: Params, prompts: Batch):
      variables = merge_params(frozen["policy"], params["policy"])
      prompts = encode_video(policy, variables, prompts)
      return prompts, policy.apply(variables, prompts, method="embed")

    self._embed = embed
    self._join = jax.jit(join_responses, static_argnames="samples")

  def begin(
    self, key: Key[Array, ""], params: Params, frozen: Params, prompts: Batch
  ) -> tuple[Batch, concurrent.futures.Future]:
    """Sends the prompts of a rollout, and does not wait for the responses.

    Args:
      key: Random key of the rollout, from which the seed of each prompt is derived.
      params: Trained parameters by role.
      frozen: Frozen parameters by role.
      prompts: Prompts, padded on the left.

    Returns:
      What `finish` takes.
    """
    self._count += 1
    adapter = self._folder / f"policy-{self._run}-{self._count}"
    variables = merge_params(frozen["policy"], params["policy"])
    write_decoder_adapter(adapter, variables, self._policy)
    prompts, embeddings = self._embed(params, frozen, prompts)
    rows, mask = jax.device_get((embeddings, prompts.mask))
    seeds = jax.random.randint(key, (len(rows),), 0, 2**31 - 1).tolist()
    texts = [encode_embeddings(row[real]) for row, real in zip(rows, mask, strict=True)]
    sampling = self._sample(adapter, texts, seeds)
    return prompts, asyncio.run_coroutine_threadsafe(sampling, self._loop)

  def finish(
    self, pending: tuple[Batch, concurrent.futures.Future]
  ) -> SampledResponses:
    """Waits for the responses to all prompts of a rollout.

    Raises:
      UserError: A server rejects the adapter or a request.
      Stopped: No server has replied for `patience_s`.
    """
    prompts, future = pending
    tokens, mask, logps = pad_responses(future.result(), self._settings)
    samples = self._settings.samples
    return self._join(prompts, tokens, mask, logps, samples=samples)

  async def _sample(
    self, adapter: pathlib.Path, texts: Sequence[str], seeds: Sequence[int]
  ) -> list[RowResponses]:
    servers = [_Server(url, self._config, each) for url, each in self._slots.items()]
    self._last_reply = time.monotonic()  # Of any server.
    tasks = [
      asyncio.create_task(self._sample_row(servers, i, adapter, text, seed))
      for i, (text, seed) in enumerate(zip(texts, seeds, strict=True))
    ]
    try:
      rows = await asyncio.gather(*tasks)
      await asyncio.gather(*(_unload(server) for server in servers))
      return rows
    finally:
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)
      await asyncio.gather(*(server.client.close() for server in servers))
      shutil.rmtree(adapter, ignore_errors=True)

  async def _sample_row(
    self,
    servers: Sequence[_Server],
    row: int,
    adapter: pathlib.Path,
    text: str,
    seed: int,
  ) -> RowResponses:
    """Requests the responses to one prompt until a server returns all of them."""
    turn = row
    while True:
      server = _choose_server(servers, turn)
      turn += 1
      async with server.slots:
        await asyncio.sleep(max(server.retry_at - time.monotonic(), 0))
        try:
          await _load(server, adapter)
          responses = await self._request(server, adapter.name, text, seed)
        except openai.NotFoundError:  # Restarted since the adapter was loaded.
          failure = "http 404"
        except (openai.APIConnectionError, openai.InternalServerError) as error:
          failure = f"{type(error).__name__}: {error}"
        except TimeoutError:
          failure = "timeout"
        except openai.APIStatusError as error:
          raise UserError(_explain(server.url, error)) from None
        else:
          server.failures, self._last_reply = 0, time.monotonic()
          return responses
        server.note_failure()
      if time.monotonic() - self._last_reply > self._config.patience_s:
        raise Stopped(
          f"no server of rollout.urls has replied for {self._config.patience_s:g} s "
          f"({server.url}: {failure}). Start the servers; this step is sampled again"
        )

  async def _request(
    self, server: _Server, adapter: str, text: str, seed: int
  ) -> RowResponses:
    own = self._settings
    async with server.limit():
      response = await server.client.completions.with_raw_response.create(
        model=adapter,
        prompt=None,  # It is in prompt_embeds; "" would be a second prompt.
        n=own.samples,
        max_tokens=own.max_new,
        temperature=own.temperature,
        top_p=own.top_p,
        seed=seed,
        logprobs=0,
        extra_body={
          "prompt_embeds": text,
          "top_k": own.top_k,
          "stop_token_ids": list(own.stops),
          "ignore_eos": True,  # The tokens that end a response are stop_token_ids.
          "return_token_ids": True,
          "skip_special_tokens": False,
          "logit_bias": self._bias,
        },
      )
    try:
      content = json.loads(response.content)
      choices = sorted(content["choices"], key=lambda x: x["index"])
    except (ValueError, KeyError, TypeError, RecursionError):
      request = response.http_request
      raise http_client.ReplyError(message="malformed reply", request=request) from None
    if not all("token_ids" in choice for choice in choices):
      raise UserError(
        f"the server {server.url} of rollout.urls returns no token_ids: use vLLM "
        "0.32.0 or later"
      )
    return RowResponses(
      [choice["token_ids"] for choice in choices],
      [choice["logprobs"]["token_logprobs"] for choice in choices],
    )


def _choose_server(servers: Sequence[_Server], turn: int) -> _Server:
  """Returns the next server in turn, or another one that has not just failed."""
  now = time.monotonic()
  ready = [server for server in servers if server.retry_at <= now]
  return (ready or servers)[turn % len(ready or servers)]


async def _load(server: _Server, adapter: pathlib.Path) -> None:
  """Loads an adapter unless the server has it.

  Raises:
    UserError: The server does not load adapters.
  """
  async with server.lock:
    if server.adapter == adapter.name:
      return
    # In place, because a server that only was slow has the adapter already.
    body = {
      "lora_name": adapter.name,
      "lora_path": str(adapter),
      "load_inplace": True,
    }
    try:
      async with server.limit():
        await server.client.post("/load_lora_adapter", body=body, cast_to=str)
    except openai.NotFoundError:
      raise UserError(
        f"the server {server.url} of rollout.urls loads no adapters: start it with "
        "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; see docs/rollouts.md"
      ) from None
    server.adapter = adapter.name


async def _unload(server: _Server) -> None:
  """Removes the adapter of a finished rollout, if the server still has it."""
  if server.adapter:
    try:
      body = {"lora_name": server.adapter}
      async with server.limit():
        await server.client.post("/unload_lora_adapter", body=body, cast_to=str)
    except (openai.APIError, TimeoutError):
      pass  # A server that has restarted has no adapter.


def _explain(url: str, error: openai.APIStatusError) -> str:
  reason = describe_error(error.response.text, "")
  return (
    f"the server {url} of rollout.urls rejects a request: http {error.status_code}: "
    f"{reason}. Start it as docs/rollouts.md says, with the decoder of this policy"
  )


def write_decoder_adapter(folder: pathlib.Path, variables: Params, policy: VLM) -> None:
  """Writes the LoRA updates of a policy as an adapter of its text model.

  Args:
    folder: Output folder.
    variables: Variables of the policy.
    policy: Model of the policy.
  """
  joined = lora.join_lora(variables, policy.llm.alpha)["llm"]
  peft_adapters.save_adapter(
    folder,
    peft_adapters.convert_to_peft(jax.device_get(joined)),
    base="decoder",
    target_modules=peft_adapters.ADAPTED_MODULES,
  )


def encode_embeddings(rows: Float[np.ndarray, "tokens embed"]) -> str:
  """Returns embeddings in the form of a request: torch's file in base64."""
  # torch is not required for anything else.
  import torch

  file = io.BytesIO()
  torch.save(torch.from_numpy(np.array(rows, np.float32)), file)
  return base64.b64encode(file.getvalue()).decode()


def pad_responses(
  rows: Sequence[RowResponses], settings: ServerSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns tokens, mask and log-probabilities of all responses, padded on the right.

  Raises:
    UserError: A prompt has another number of responses than requested.
  """
  flat = [pair for row in rows for pair in zip(*row, strict=True)]
  if len(flat) != len(rows) * settings.samples:
    raise UserError(
      f"the servers of rollout.urls returned {len(flat)} responses to {len(rows)} "
      f"prompts instead of {len(rows) * settings.samples}. Check their version."
    )
  shape = (len(flat), settings.max_new)
  tokens, logps = np.full(shape, settings.pad, np.int32), np.zeros(shape, np.float32)
  mask = np.zeros(shape, bool)
  for i, (ids, values) in enumerate(flat):
    tokens[i, : len(ids)], logps[i, : len(ids)] = ids, values
    mask[i, : len(ids)] = True
  return tokens, mask, logps
