"""Answers of a model to questions about videos, in batches of one shape."""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax import build, hosts, sharding
from vlmrlaif_jax.data import text
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.feedback.judge import Query
from vlmrlaif_jax.generate import generate
from vlmrlaif_jax.types import Batch, Params


class Request(NamedTuple):
  """A question about a video, or about the frames start..stop-1 of it."""

  id: str  # Of the request; what is sampled depends on it, not on its neighbours.
  video: VideoPath
  question: str
  start: int = 0
  stop: int | None = None
  history: tuple[tuple[str, str], ...] = ()  # The turns before the question.


class Reply(NamedTuple):
  """What a model said to a request."""

  text: str  # "" if the prompt did not fit.
  stopped: bool  # Whether it came to its end within the length it was given.
  fits: bool = True


class Sampling(NamedTuple):
  """How to sample; every field is static, so a new value compiles anew."""

  prompt_len: int
  max_new: int
  batch: int  # Requests at once.
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  samples: int = 1


_generate = jax.jit(
  generate,
  static_argnums=0,
  static_argnames=(
    "max_new",
    "temperature",
    "top_p",
    "top_k",
    "eos",
    "pad",
    "samples",
    "vocab",
  ),
)


def answer(
  run: build.Run,
  variables: Params,
  requests: Sequence[Request],
  sampling: Sampling,
  *,
  seed: int,
) -> list[list[Reply]]:
  """`samples` replies to each request, all of which have the same number of frames.

  Args:
    variables: of run.policy.
    seed: with a request's id it settles what is sampled.
  """
  replies: list[list[Reply]] = []
  for start in range(0, len(requests), sampling.batch):
    part = requests[start : start + sampling.batch]
    replies += _answer_batch(run, variables, part, sampling, seed)
  return replies


def _answer_batch(run, variables, part, sampling, seed) -> list[list[Reply]]:
  tok = run.tokenizer
  batch, fits = prompt_batch(
    run, part, prompt_len=sampling.prompt_len, rows=sampling.batch
  )
  ids = np.array([zlib.crc32(r.id.encode()) & 0x7FFFFFFF for r in part], np.int32)
  ids = np.resize(ids, sampling.batch)
  sampled = _generate(
    run.policy,
    variables,
    sharding.put(batch, run.mesh),
    jax.random.key(seed),
    max_new=sampling.max_new,
    temperature=sampling.temperature,
    top_p=sampling.top_p,
    top_k=sampling.top_k,
    eos=run.eos,
    pad=tok.pad_token_id,
    samples=sampling.samples,
    ids=jnp.asarray(ids),
    vocab=plain_vocab(tok, run.eos),
  )
  tokens, kept = hosts.fetch((sampled.batch.tokens, sampled.batch.loss_mask))
  texts = text.responses_text(tok, tokens, kept)
  stopped = np.any((tokens == run.eos) & kept, axis=1)
  rows = [Reply(t, bool(s)) for t, s in zip(texts, stopped, strict=True)]
  n = sampling.samples
  return [
    rows[i * n : (i + 1) * n] if fits[i] else [Reply("", False, False)] * n
    for i in range(len(part))
  ]


def prompt_batch(
  run: build.Run, requests: Sequence[Request], *, prompt_len: int, rows: int
) -> tuple[Batch, list[bool]]:
  """Prompts on the host, filled up to `rows` with copies, and which of them fit.

  The prompts are those of the rows that this process has, and are all its videos.
  """
  own = hosts.mine(rows, run.mesh) % len(requests)
  videos = [requests[i] for i in own]
  video = np.stack([run.features.get(r.video)[r.start : r.stop] for r in videos])
  count = build.video_tokens(run, video.shape[1])
  encoded = [
    prompt_ids(run, [*r.history, (r.question, None)], video_tokens=count)
    for r in requests
  ]
  fits = [text.fits(e, prompt_len=prompt_len, response_len=0) for e in encoded]
  empty = prompt_ids(run, [("", None)], video_tokens=count)
  encoded = [e if ok else empty for e, ok in zip(encoded, fits, strict=True)]
  tokens = text.pad_rows(
    [encoded[i] for i in own],
    prompt_len=prompt_len,
    response_len=0,
    pad=run.tokenizer.pad_token_id,
  )
  return Batch(video, *tokens), fits


def prompt_ids(run: build.Run, turns: Sequence, *, video_tokens: int) -> text.Encoded:
  """A conversation to go on from; what was answered in it before is of the prompt."""
  row = text.encode(run.tokenizer, run.template, turns, video_tokens=video_tokens)
  return text.Encoded(row.ids, [False] * len(row.ids))


def request_of(query: Query) -> Request:
  """What a judge is asked, as a request to a model of ours."""
  return Request(query.id, query.video, query.prompt, history=query.history)


@functools.lru_cache
def plain_vocab(tokenizer: text.PreTrainedTokenizerBase, eos: int) -> int:
  """Ids from here on are special tokens added at the end, which nobody should say."""
  added = [i for i in tokenizer.added_tokens_decoder if i > eos]
  last = len(tokenizer)
  while last - 1 in added:
    last -= 1
  return last


def filled(block: range, size: int) -> list[int]:
  """The numbers of a block, its last repeated up to `size`: batches of one shape."""
  return [min(i, block[-1]) for i in range(block[0], block[0] + size)]


def filled_here(run: build.Run, block: range, size: int) -> list[int]:
  """Those of `filled` whose rows this process has."""
  rows = filled(block, size)
  return [rows[i] for i in hosts.mine(size, run.mesh)]


def blocks(count: int, size: int) -> Iterator[range]:
  """range(count) in consecutive blocks of at most `size`."""
  for start in range(0, count, size):
    yield range(start, min(start + size, count))
