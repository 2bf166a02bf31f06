"""How likely a policy finds each option of a multiple choice, as its answer."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkQuestion
from vlmrlaif_jax.runtime import scoring
from vlmrlaif_jax.runtime.run import Run


def load_or_compute_option_logps(
  run: Run,
  variables: Params,
  questions: Sequence[BenchmarkQuestion],
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
    pairs = [
      (q, option) for q in part if is_fitting_question(run, q) for option in q.options
    ]
    examples = [{"video": q.video, "question": q.text} for q, _ in pairs]
    texts = [option for _, option in pairs]
    found: dict[str, list[float]] = {}
    made = compute_option_logps(run, variables, examples, texts, batch_size=batch)
    for (q, _), value in zip(pairs, made, strict=True):
      found.setdefault(q.id, []).append(float(value))
    return [{"id": q.id, "options": q.options, "logps": found.get(q.id)} for q in part]

  told = [(q.id, q.text, q.options, run.features.digest(q.video)) for q in questions]
  lengths = (run.config.data.prompt_len, run.config.data.response_len)
  rows = resumable.load_or_compute(
    path,
    run.watch.blocks(make),
    count=len(questions),
    batch=batch,
    fingerprint=resumable.compute_fingerprint(variables, lengths, run.template, told),
    tell=tell,
  )
  return [row["logps"] for row in rows]


def is_fitting_question(run: Run, question: BenchmarkQuestion) -> bool:
  """Whether a question does, with each of its options as the answer, uncut."""
  data, count = run.config.data, run.policy.count_video_tokens(run.config.model.frames)
  rows = [
    tokenization.encode_conversation(
      run.tokenizer, run.template, [(question.text, option)], video_tokens=count
    )
    for option in question.options
  ]
  return all(
    tokenization.is_within_lengths(
      row, prompt_len=data.prompt_len, response_len=data.response_len
    )
    for row in rows
  )


def compute_option_logps(
  run: Run,
  variables: Params,
  examples: Sequence[Mapping[str, Any]],
  texts: Sequence[str],
  *,
  batch_size: int,
) -> Float[np.ndarray, " texts"]:
  """log p(text | video, question), in nats: the sum over the text's tokens.

  The end token is not of it: whether a policy would go on after a letter is not asked.
  """
  if not texts:
    return np.zeros(0, np.float32)
  logps_of = scoring.make_answer_logps(run.policy, run.config.data.prompt_len, run.eos)
  score = lambda batch: logps_of(variables, batch)[1]
  return scoring.score_in_batches(run, score, examples, texts, batch_size)
