"""Selects the best of n answers by DPO's implicit reward (RLAIF-V, 2405.17220, 2.4).

  r(y) = beta / T * (log p(y | x) - log p_ref(y | x)),   T: tokens of y

The factor 1 / T removes a preference for short answers. No judge is needed.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.types import Batch, Params
from vlmrlaif_jax.feedback.claims import compute_self_rewards
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering, scoring
from vlmrlaif_jax.runtime.run import Run


def load_or_sample_candidates(
  run: Run,
  variables: Params,
  reference: Params,
  queries: Sequence[JudgeQuery],
  sampling: answering.SamplingSettings,
  path: pathlib.Path,
  *,
  beta: float,
) -> list[JsonRow]:
  """Samples answers to each question and computes their rewards, or reads them.

  Args:
    run: The run.
    variables: Variables of run.policy, trained by DPO.
    reference: Variables of run.policy at the start of DPO.
    queries: Questions.
    sampling: Sampling settings, with the number of answers.
    path: File that caches the result for these weights and settings.
    beta: Coefficient of DPO.

  Returns:
    A row for each question: its "replies" and their rewards, as the "mean" per token
    and as the "total", DPO's own reward.
  """
  queries = [query._replace(id=f"best:{query.id}") for query in queries]
  score_replies = _make_reply_scorer(run, variables, reference, beta)

  def make_rows(block: range) -> list[JsonRow]:
    part = [queries[i] for i in block]
    replies = answering.Answerer(run, variables, sampling).generate_replies(part)
    mean, total = score_replies(part, replies)
    return [
      {"id": q.id, "replies": samples, "mean": mean[i], "total": total[i]}
      for i, (q, samples) in enumerate(zip(part, replies, strict=True))
    ]

  facts = [(q.id, q.prompt, run.features.digest(q.video)) for q in queries]
  both = {"policy": variables, "reference": reference}
  return resumable.load_or_compute(
    path,
    run.watch.wrap_blocks(make_rows),
    count=len(queries),
    batch=answering.BATCHES * sampling.batch,
    fingerprint=resumable.compute_fingerprint(
      both,
      sampling.cache_key(),
      beta,
      run.config.seed,
      run.template,
      run.stops,
      facts,
    ),
  )


def _make_reply_scorer(run: Run, variables: Params, reference: Params, beta: float):
  """Returns a function from queries and replies to (mean, total) rewards by query."""
  logps_fn = scoring.make_answer_logps(
    run.policy, run.config.data.prompt_len, run.stops
  )

  def score(batch: Batch):
    whole = [logps_fn(each, batch)[0] for each in (variables, reference)]
    return (*whole, batch.loss_mask.sum(axis=1))

  def score_replies(
    queries: Sequence[JudgeQuery], replies: Sequence[Sequence[answering.VideoReply]]
  ) -> list[list[list[float]]]:
    flat = [
      (q, x.text) for q, samples in zip(queries, replies, strict=True) for x in samples
    ]
    examples = [{"video": q.video, "question": q.prompt} for q, _ in flat]
    texts = [text for _, text in flat]
    scores = scoring.score_in_batches(
      run, score, examples, texts, scoring.SCORING_BATCH
    )
    logps, ref_logps, lengths = (each.reshape(len(queries), -1) for each in scores)
    return [
      compute_self_rewards(logps, ref_logps, count, beta=beta).tolist()
      for count in (lengths, np.minimum(lengths, 1))
    ]

  return score_replies


def choose_best(
  rows: Sequence[JsonRow], by: str, count: int
) -> list[answering.VideoReply]:
  """Returns the best of the first `count` answers to each question, by reward.

  A truncated answer is returned only if all are truncated.

  Args:
    rows: Output of load_or_sample_candidates.
    by: "mean" or "total".
    count: Number of answers to choose from.
  """
  replies = [[answering.VideoReply(*reply) for reply in row["replies"]] for row in rows]
  rewards = np.array([row[by] for row in rows])
  ended = np.array([[reply.stopped for reply in samples] for samples in replies])
  order = np.where(ended, rewards, rewards - np.ptp(rewards) - 1)
  chosen = np.argmax(order[:, :count], axis=1)
  return [samples[i] for samples, i in zip(replies, chosen, strict=True)]
