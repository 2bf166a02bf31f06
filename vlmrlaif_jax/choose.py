"""How likely a policy finds each option of a multiple choice, as its answer."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlmrlaif_jax import answer, build, hosts, scoring, sharding
from vlmrlaif_jax.data import text
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import common
from vlmrlaif_jax.evals.benchmark import Question
from vlmrlaif_jax.generate import response_logps
from vlmrlaif_jax.types import Batch, Params


def kept(
  run: build.Run,
  variables: Params,
  questions: Sequence[Question],
  path: pathlib.Path,
  *,
  batch: int,
  tell: Callable[[int], None],
) -> list[list[float] | None]:
  """The log-probability of each option, in nats; None to a question that does not fit,
  with one of its options. Those in the file are taken from there.

  Args:
    variables: of run.policy.
    batch: options at once, and questions that reach the file together.
    tell: is given how many questions are done.
  """

  def make(block: range) -> list[dict[str, Any]]:
    part = [questions[i] for i in block]
    pairs = [(q, option) for q in part if fits(run, q) for option in q.options]
    examples = [{"video": q.video, "question": q.text} for q, _ in pairs]
    texts = [option for _, option in pairs]
    found: dict[str, list[float]] = {}
    made = logps(run, variables, examples, texts, batch_size=batch)
    for (q, _), value in zip(pairs, made, strict=True):
      found.setdefault(q.id, []).append(float(value))
    return [{"id": q.id, "options": q.options, "logps": found.get(q.id)} for q in part]

  told = [(q.id, q.text, q.options, build.features_of(run, q.video)) for q in questions]
  lengths = (run.config.data.prompt_len, run.config.data.response_len)
  rows = common.kept_rows(
    path,
    run.watch.blocks(make),
    count=len(questions),
    batch=batch,
    fingerprint=common.fingerprint(variables, lengths, run.template, told),
    tell=tell,
  )
  return [row["logps"] for row in rows]


def fits(run: build.Run, question: Question) -> bool:
  """Whether a question does, with each of its options as the answer, uncut."""
  data, count = run.config.data, build.video_tokens(run, run.config.model.frames)
  rows = [
    text.encode(
      run.tokenizer, run.template, [(question.text, option)], video_tokens=count
    )
    for option in question.options
  ]
  return all(
    text.fits(row, prompt_len=data.prompt_len, response_len=data.response_len)
    for row in rows
  )


def logps(
  run: build.Run,
  variables: Params,
  examples: Sequence[Example],
  texts: Sequence[str],
  *,
  batch_size: int,
) -> Float[np.ndarray, " texts"]:
  """log p(text | video, question), in nats: the sum over the text's tokens.

  The end token is not of it: whether a policy would go on after a letter is not asked.
  """
  size = text.bucket(batch_size, multiple=sharding.row_shards(run.mesh))
  of_rows = _logps(run.policy, run.config.data.prompt_len, run.eos)
  made = [np.zeros(0, np.float32)]
  for block in answer.blocks(len(texts), size):
    rows = answer.filled_here(run, block, size)
    batch = scoring.scored_batch(
      run, [examples[i] for i in rows], [texts[i] for i in rows]
    )
    found = hosts.fetch(of_rows(variables, sharding.put(batch, run.mesh)))
    made.append(found[: len(block)])
  return np.concatenate(made)


@functools.lru_cache
def _logps(model, start: int, eos: int):
  """Of whole texts, at temperature 1."""

  def logps(variables: Params, batch: Batch) -> Float[Array, " batch"]:
    each, _ = response_logps(
      model, variables, batch, start=start, chunk=128, temperature=1.0
    )
    return jnp.where(batch.tokens == eos, 0.0, each).sum(axis=1)

  return jax.jit(logps)
