"""Log-probabilities of the options of multiple-choice questions under a policy."""

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
  on_done: Callable[[int], None],
) -> list[list[float] | None]:
  """Computes the log-probability of each option, in nats, or reads it from the file.

  Args:
    run: The run.
    variables: Variables of run.policy.
    questions: Questions with options.
    path: File that caches the result for these weights.
    batch: Options per batch, and questions per write to the file.
    on_done: Receives the number of finished questions.

  Returns:
    The log-probabilities of each question's options. None if one does not fit.
  """

  def make_rows(block: range) -> list[dict[str, Any]]:
    part = [questions[i] for i in block]
    pairs = [
      (q, option) for q in part if is_fitting_question(run, q) for option in q.options
    ]
    examples = [{"video": q.video, "question": q.text} for q, _ in pairs]
    texts = [option for _, option in pairs]
    by_id: dict[str, list[float]] = {}
    logps = compute_option_logps(run, variables, examples, texts, batch_size=batch)
    for (q, _), value in zip(pairs, logps, strict=True):
      by_id.setdefault(q.id, []).append(float(value))
    return [{"id": q.id, "options": q.options, "logps": by_id.get(q.id)} for q in part]

  facts = [(q.id, q.text, q.options, run.features.digest(q.video)) for q in questions]
  lengths = (run.config.data.prompt_len, run.config.data.response_len)
  rows = resumable.load_or_compute(
    path,
    run.watch.wrap_blocks(make_rows),
    count=len(questions),
    batch=batch,
    fingerprint=resumable.compute_fingerprint(variables, lengths, run.template, facts),
    on_progress=on_done,
  )
  return [row["logps"] for row in rows]


def is_fitting_question(run: Run, question: BenchmarkQuestion) -> bool:
  """Returns whether a question fits untruncated with each option as the answer."""
  data, video = run.config.data, run.lay_out_video(question.video)
  rows = [
    tokenization.encode_conversation(
      run.tokenizer, run.template, [(question.text, option)], video=video
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
  """Computes log p(text | video, question) in nats, summed over the text's tokens.

  The sum excludes EOS, because a policy may continue after a letter.
  """
  if not texts:
    return np.zeros(0, np.float32)
  logps_fn = scoring.make_answer_logps(
    run.policy, run.config.data.prompt_len, run.stops
  )
  score = lambda batch: logps_fn(variables, batch)[1]
  return scoring.score_in_batches(run, score, examples, texts, batch_size)
