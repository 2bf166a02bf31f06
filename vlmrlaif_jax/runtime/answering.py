"""Batched generation: answers many video questions with a fixed-size batch."""

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
from vlmrlaif_jax.core.types import Batch, Params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.sampling.generate import SampledResponses, generate


class VideoReply(NamedTuple):
  """What a model said to a query."""

  text: str  # "" if the prompt did not fit.
  stopped: bool  # Whether it came to its end within the length it was given.
  fits: bool = True


class SamplingSettings(NamedTuple):
  """How to sample; every field is static, so a new value compiles anew."""

  prompt_len: int
  max_new: int
  batch: int  # Queries at once; where one is answered, the next begins.
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  samples: int = 1

  def cache_key(self) -> "SamplingSettings":
    """What replies depend on: not how many queries there are at once."""
    return self._replace(batch=0)


def read_sampling_settings(
  config: ConfigDict, section: str, samples: int = 1
) -> SamplingSettings:
  """Answers to the data's prompts, as a section of the config samples them."""
  data, own = config.data, config[section]
  lengths = (data.prompt_len, data.response_len)
  return SamplingSettings(
    *lengths, own.batch, own.temperature, own.top_p, samples=samples
  )


def make_queries(examples: Sequence[Example]) -> list[JudgeQuery]:
  """The questions of examples, to sample answers to."""
  return [JudgeQuery(f"answer:{e['id']}", e["video"], e["question"]) for e in examples]


BATCHES = 4  # As many batches of prompts are on the device, most of them waiting.


def answer_requests(
  run: Run,
  variables: Params,
  queries: Sequence[JudgeQuery],
  sampling: SamplingSettings,
  *,
  seed: int,
) -> list[list[VideoReply]]:
  """`samples` replies to each query, all of which have the same number of frames.

  Args:
    run: the run whose policy answers.
    variables: of run.policy.
    queries: what is asked.
    sampling: how to sample.
    seed: with a query's id it settles what is sampled.
  """
  n, settings = sampling.samples, tuple(make_generate_settings(run, sampling).items())
  size = sampling.batch * (1 if len(queries) <= sampling.batch else BATCHES)
  places = deal_round_robin(size, sharding.num_batch_shards(run.mesh))
  replies: list[list[VideoReply]] = []
  for block in split_blocks(len(queries), size):
    part = [queries[i] for i in block]
    asked = [part[i] if i < len(part) else None for i in places]
    batch, fits = make_prompt_batch(run, asked, prompt_len=sampling.prompt_len)
    ids = [zlib.crc32(q.id.encode()) & 0x7FFFFFFF if q else 0 for q in asked]
    prompts, key = sharding.shard_batch(batch, run.mesh), jax.random.key(seed)
    sampled = _sample(run.policy, settings, variables, prompts, key, jnp.array(ids))
    tokens, kept = distributed.fetch_arrays(
      (sampled.batch.tokens, sampled.batch.loss_mask)
    )
    texts = tokenization.decode_responses(run.tokenizer, tokens, kept)
    stopped = np.any((tokens == run.eos) & kept, axis=1)
    rows = [VideoReply(t, bool(s)) for t, s in zip(texts, stopped, strict=True)]
    found = [
      rows[i * n : (i + 1) * n] if fits[i] else [VideoReply("", False, False)] * n
      for i in range(size)
    ]
    replies += [found[i] for i in np.argsort(places)[: len(part)]]
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
  """Returns the settings of `generate` by which a run answers queries."""
  return dict(
    max_new=sampling.max_new,
    temperature=sampling.temperature,
    top_p=sampling.top_p,
    top_k=sampling.top_k,
    samples=sampling.samples,
    slots=sampling.batch * sampling.samples,
    **get_token_ids(run),
  )


def get_token_ids(run: Run) -> dict[str, int]:
  """Returns the ids that sampling needs: of the end, of padding, and the first that
  is never sampled: the special tokens that were added at the end of the vocabulary.
  """
  tokenizer = run.tokenizer
  vocab = len(tokenizer)
  added = [i for i in tokenizer.added_tokens_decoder if i > run.eos]
  while vocab - 1 in added:
    vocab -= 1
  return dict(eos=run.eos, pad=tokenizer.pad_token_id, vocab=vocab)


def deal_round_robin(count: int, hands: int) -> Int[np.ndarray, " count"]:
  """range(count), dealt out: what the first hand has, then what the second has."""
  return np.arange(count).reshape(-1, hands).T.reshape(-1)


def make_prompt_batch(
  run: Run, queries: Sequence[JudgeQuery | None], *, prompt_len: int
) -> tuple[Batch, list[bool]]:
  """Prompts on the host, and which of them fit.

  The prompts are those of the rows that this process has, and so are their videos.

  Args:
    queries: one a row; where there is none, no token is real.
  """
  first = next(q for q in queries if q)
  filled_up = [q or first for q in queries]
  own = distributed.local_rows(len(queries), run.mesh)
  videos = [filled_up[i] for i in own]
  video = np.stack([run.features.get(q.video)[q.start : q.stop] for q in videos])
  count = run.policy.video_tokens(video.shape[1])
  encoded = [
    encode_prompt(run, [*q.history, (q.prompt, None)], video_tokens=count)
    for q in filled_up
  ]
  fits = [
    tokenization.is_within_lengths(e, prompt_len=prompt_len, response_len=0)
    for e in encoded
  ]
  empty = encode_prompt(run, [("", None)], video_tokens=count)
  encoded = [e if ok else empty for e, ok in zip(encoded, fits, strict=True)]
  tokens, mask, loss_mask = tokenization.pad_rows(
    [encoded[i] for i in own],
    prompt_len=prompt_len,
    response_len=0,
    pad=run.tokenizer.pad_token_id,
  )
  asks = np.array([queries[i] is not None for i in own])
  return Batch(video, tokens, mask & asks[:, None], loss_mask), fits


def encode_prompt(
  run: Run, turns: Sequence, *, video_tokens: int
) -> tokenization.EncodedConversation:
  """A conversation to go on from; what was answered in it before is of the prompt."""
  row = tokenization.encode_conversation(
    run.tokenizer, run.template, turns, video_tokens=video_tokens
  )
  return tokenization.EncodedConversation(row.ids, [False] * len(row.ids))


def pad_local_indices(run: Run, block: range, size: int) -> list[int]:
  """The rows that this process has of a batch of `size`: the numbers of a block, of
  which the last is repeated, so that all batches have one shape.
  """
  mine = distributed.local_rows(size, run.mesh).tolist()
  return [min(block[0] + i, block[-1]) for i in mine]


def split_blocks(count: int, size: int) -> Iterator[range]:
  """range(count) in consecutive blocks of at most `size`."""
  for start in range(0, count, size):
    yield range(start, min(start + size, count))


class Answerer(NamedTuple):
  """The way to get responses from a model of a run: a policy or a judge."""

  run: Run
  variables: Params  # Of run.policy.
  sampling: SamplingSettings
  # A JSONL file that saves replies, which are reused for the same weights, queries and
  # sampling. None saves nothing.
  cache: pathlib.Path | None = None

  def generate_replies(
    self,
    queries: Sequence[JudgeQuery],
    on_done: Callable[[int], None] = lambda done: None,
  ) -> list[list[VideoReply]]:
    """Returns `sampling.samples` replies to each query.

    Args:
      queries: about videos of one number of frames.
      on_done: takes the number of queries that have replies, after each batch.
    """
    run = self.run
    make = lambda part: answer_requests(
      run, self.variables, part, self.sampling, seed=run.config.seed
    )
    if self.cache is None:
      return make(queries)

    def rows_of(block: range) -> list[JsonRow]:
      part = [queries[i] for i in block]
      return [
        {"id": query.id, "question": query.prompt, "replies": replies}
        for query, replies in zip(part, make(part), strict=True)
      ]

    facts = [(q.id, q.prompt, run.features.digest(q.video)) for q in queries]
    rows = resumable.load_or_compute(
      self.cache,
      run.watch.wrap_blocks(rows_of),
      count=len(queries),
      batch=BATCHES * self.sampling.batch,
      fingerprint=resumable.compute_fingerprint(
        self.variables, self.sampling.cache_key(), run.config.seed, run.template, facts
      ),
      on_progress=on_done,
    )
    return [[VideoReply(*reply) for reply in row["replies"]] for row in rows]

  def ask_judge(self, queries: Sequence[JudgeQuery]) -> list[str | None]:
    """Returns the first reply to each query; None where the prompt did not fit."""
    replies = self.generate_replies(queries)
    return [first.text if first.fits else None for first, *_ in replies]
