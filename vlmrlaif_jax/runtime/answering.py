"""Batched generation: a model's responses to many requests about videos.

`answer_requests` samples in batches of one shape, so that one program is compiled.
`Answerer` adds a cache of responses on disk.
"""

import functools
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, resumable, sharding
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.types import Batch, Params, is_stop
from vlmrlaif_jax.data import stop_tokens, tokenization
from vlmrlaif_jax.data.processors.interface import VideoTokens
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.sampling.generate import SampledResponses, generate


class VideoReply(NamedTuple):
  """A model's response to a request."""

  text: str  # The response, "" if the prompt does not fit.
  stopped: bool  # Whether the response has an EOS token.
  fits: bool = True  # Whether the prompt is at most `prompt_len` tokens long.


class SamplingSettings(NamedTuple):
  """Settings of sampling. All are static: another value compiles another program."""

  prompt_len: int  # Maximum length of a prompt, in tokens.
  max_new: int  # Maximum length of a response, in tokens.
  batch: int  # Requests that are decoded concurrently.
  temperature: float = 0.0  # 0 is greedy decoding.
  top_p: float = 1.0  # Nucleus probability mass; 1 disables it.
  top_k: int = 0  # Number of candidate tokens; 0 disables it.
  samples: int = 1  # Responses per request.

  def cache_key(self) -> "SamplingSettings":
    """Returns the settings that responses depend on: all but `batch`."""
    return self._replace(batch=0)


def read_sampling_settings(
  config: ConfigDict, section: str, samples: int = 1
) -> SamplingSettings:
  """Returns the settings of a section for sampling responses to the data's prompts."""
  data, own = config.data, config[section]
  lengths = (data.prompt_len, data.response_len)
  return SamplingSettings(
    *lengths, own.batch, own.temperature, own.top_p, samples=samples
  )


def make_queries(examples: Sequence[Example]) -> list[JudgeQuery]:
  """Returns a request for each example: its video and its question."""
  return [JudgeQuery(f"answer:{e['id']}", e["video"], e["question"]) for e in examples]


BATCHES = 4  # Batches of prompts on the devices; all but one wait for free slots.


def answer_requests(
  run: Run,
  variables: Params,
  queries: Sequence[JudgeQuery],
  sampling: SamplingSettings,
  *,
  seed: int,
) -> list[list[VideoReply]]:
  """Samples responses to requests about videos.

  Args:
    run: the run whose policy responds.
    variables: variables of run.policy.
    queries: requests whose videos all have the same number of frames.
    sampling: lengths, batch size and settings of sampling.
    seed: seed of sampling. A response depends on it and on its request's id.

  Returns:
    A list of `sampling.samples` responses for each request, in order.
  """
  n, settings = sampling.samples, tuple(make_generate_settings(run, sampling).items())
  size = sampling.batch * (1 if len(queries) <= sampling.batch else BATCHES)
  places = deal_round_robin(size, sharding.num_batch_shards(run.mesh))
  replies: list[list[VideoReply]] = []
  for block in split_blocks(len(queries), size):
    part = [queries[i] for i in block]
    rows = [part[i] if i < len(part) else None for i in places]
    batch, fits = make_prompt_batch(run, rows, prompt_len=sampling.prompt_len)
    ids = [zlib.crc32(q.id.encode()) & 0x7FFFFFFF if q else 0 for q in rows]
    prompts, key = sharding.shard_batch(batch, run.mesh), jax.random.key(seed)
    sampled = _sample(run.policy, settings, variables, prompts, key, jnp.array(ids))
    tokens, mask = distributed.fetch_arrays(
      (sampled.batch.tokens, sampled.batch.loss_mask)
    )
    texts = tokenization.decode_responses(run.tokenizer, tokens, mask)
    stopped = np.any(is_stop(tokens, run.stops) & mask, axis=1)
    flat = [VideoReply(t, bool(s)) for t, s in zip(texts, stopped, strict=True)]
    row_replies = [
      flat[i * n : (i + 1) * n] if fits[i] else [VideoReply("", False, False)] * n
      for i in range(size)
    ]
    replies += [row_replies[i] for i in np.argsort(places)[: len(part)]]
  return replies


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(
  model: vlm.VLM,
  settings: tuple[tuple[str, Any], ...],
  variables: Params,
  prompts: Batch,
  key: Key[Array, ""],
  ids: Int[Array, " batch"],
) -> SampledResponses:
  return generate(model, variables, prompts, key, ids=ids, **dict(settings))


def make_generate_settings(run: Run, sampling: SamplingSettings) -> dict[str, Any]:
  """Returns the arguments of `generate` by which a run samples responses."""
  return dict(
    max_new=sampling.max_new,
    temperature=sampling.temperature,
    top_p=sampling.top_p,
    top_k=sampling.top_k,
    samples=sampling.samples,
    slots=sampling.batch * sampling.samples,
    **get_token_ids(run),
  )


def get_token_ids(run: Run) -> dict[str, Any]:
  """Returns `stops`, `pad` and `vocab` of a run, as `generate` takes them.

  `vocab` is the number of ids that may be sampled. It excludes the special tokens at
  the end of the vocabulary.
  """
  vocab = stop_tokens.count_sampled_ids(run.tokenizer, run.stops)
  return dict(stops=run.stops, pad=run.tokenizer.pad_token_id, vocab=vocab)


def deal_round_robin(count: int, shards: int) -> Int[np.ndarray, " count"]:
  """Returns range(count) in the order that deals it to shards in turn.

  >>> deal_round_robin(6, 2).tolist()
  [0, 2, 4, 1, 3, 5]
  """
  return np.arange(count).reshape(-1, shards).T.reshape(-1)


def make_prompt_batch(
  run: Run, queries: Sequence[JudgeQuery | None], *, prompt_len: int
) -> tuple[Batch, list[bool]]:
  """Returns a batch of prompts on the host, with the rows of this process alone.

  Args:
    run: the run whose tokenizer, template and features are used.
    queries: a request for each row. The row of a None, or of a prompt that does not
      fit, is all padding.
    prompt_len: maximum length of a prompt, in tokens.

  Returns:
    The batch, and for each request whether its prompt fits.
  """
  first = next(q for q in queries if q)
  filled_up = [q or first for q in queries]
  own = distributed.local_rows(len(queries), run.mesh)
  videos = [filled_up[i] for i in own]
  video = np.stack([run.features.get(q.video, q.start, q.stop) for q in videos])
  if run.processor.layout is None:
    video = video[:, :prompt_len]  # A prompt that fits has no more features.
  layouts = [run.lay_out_video(q.video, q.start, q.stop) for q in filled_up]
  encoded = [
    encode_prompt(run, [*q.history, (q.prompt, None)], tokens)
    for q, tokens in zip(filled_up, layouts, strict=True)
  ]
  fits = [
    tokenization.is_within_lengths(e, prompt_len=prompt_len, response_len=0)
    for e in encoded
  ]
  rows = tokenization.pad_rows(
    [encoded[i] if queries[i] and fits[i] else encoded[i].truncate(0) for i in own],
    prompt_len=prompt_len,
    response_len=0,
    pad=run.tokenizer.pad_token_id,
  )
  return Batch(video, *rows), fits


def encode_prompt(
  run: Run, turns: Sequence, video: VideoTokens
) -> tokenization.EncodedConversation:
  """Returns the tokens of a conversation whose turns all belong to the prompt."""
  row = tokenization.encode_conversation(
    run.tokenizer, run.template, turns, video=video
  )
  return row._replace(learn=[False] * len(row.ids))


def pad_local_indices(run: Run, block: range, size: int) -> list[int]:
  """Returns the numbers of the examples in this process's rows of a batch.

  The batch has `size` rows in all processes. The last number of a block is repeated, so
  that all batches have one shape.
  """
  mine = distributed.local_rows(size, run.mesh).tolist()
  return [min(block[0] + i, block[-1]) for i in mine]


def split_blocks(count: int, size: int) -> Iterator[range]:
  """Yields consecutive blocks of range(count), each of at most `size` numbers."""
  for start in range(0, count, size):
    yield range(start, min(start + size, count))


class Answerer(NamedTuple):
  """A model of a run that responds to requests: a policy or a judge."""

  run: Run
  variables: Params  # Variables of run.policy.
  sampling: SamplingSettings
  # JSONL file of responses, which are reused for the same weights, requests and
  # sampling. None saves nothing.
  cache: pathlib.Path | None = None

  def generate_replies(
    self,
    queries: Sequence[JudgeQuery],
    on_done: Callable[[int], None] = lambda done: None,
  ) -> list[list[VideoReply]]:
    """Returns `sampling.samples` responses to each request.

    Args:
      queries: requests whose videos all have the same number of frames.
      on_done: receives the number of requests that have responses, after each batch.
    """
    run = self.run
    answer = lambda part: answer_requests(
      run, self.variables, part, self.sampling, seed=run.config.seed
    )
    if self.cache is None:
      return answer(queries)

    def make_rows(block: range) -> list[JsonRow]:
      part = [queries[i] for i in block]
      return [
        {"id": query.id, "question": query.prompt, "replies": replies}
        for query, replies in zip(part, answer(part), strict=True)
      ]

    keys = [(q.id, q.prompt, run.features.digest(q.video)) for q in queries]
    rows = resumable.load_or_compute(
      self.cache,
      run.watch.wrap_blocks(make_rows),
      count=len(queries),
      batch=BATCHES * self.sampling.batch,
      fingerprint=resumable.compute_fingerprint(
        self.variables,
        self.sampling.cache_key(),
        run.config.seed,
        run.template,
        run.stops,
        keys,
      ),
      on_progress=on_done,
    )
    return [[VideoReply(*reply) for reply in row["replies"]] for row in rows]

  def ask_judge(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
    """Returns the first response to each request, None if its prompt does not fit."""
    replies = self.generate_replies(queries)
    return [first.text if first.fits else None for first, *_ in replies]
