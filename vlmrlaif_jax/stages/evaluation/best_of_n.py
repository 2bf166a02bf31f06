"""The best of n answers by the reward that DPO has left in a policy (2405.17220, 2.4).

  r(y) = beta / T * (log p(y | x) - log p_ref(y | x)),   T: tokens of y

Without 1 / T it would prefer short answers. No judge is asked.
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
  """Returns of each question `sampling.samples` "replies", and their rewards: "mean",
  per token, and "total", of whole answers, as DPO's own.

  Args:
    run: the run.
    variables: of run.policy, trained by DPO.
    reference: of run.policy; what DPO began with.
    queries: the questions.
    sampling: how to answer.
    path: of the file that saves them; those of the same weights are taken from there.
    beta: DPO's.
  """
  queries = [query._replace(id=f"best:{query.id}") for query in queries]
  logps_of = scoring.make_answer_logps(run.policy, run.config.data.prompt_len, run.eos)

  def score(batch: Batch):
    whole = [logps_of(each, batch)[0] for each in (variables, reference)]
    return (*whole, batch.loss_mask.sum(axis=1))

  def make(block: range) -> list[JsonRow]:
    part = [queries[i] for i in block]
    replies = answering.Answerer(run, variables, sampling).generate_replies(part)
    flat = [(q, x.text) for q, said in zip(part, replies, strict=True) for x in said]
    examples = [{"video": q.video, "question": q.prompt} for q, _ in flat]
    texts = [text for _, text in flat]
    scores = scoring.score_in_batches(
      run, score, examples, texts, scoring.SCORING_BATCH
    )
    logps, ref_logps, lengths = (each.reshape(len(part), -1) for each in scores)
    mean, total = (
      compute_self_rewards(logps, ref_logps, count, beta=beta).tolist()
      for count in (lengths, np.minimum(lengths, 1))
    )
    return [
      {"id": q.id, "replies": said, "mean": mean[i], "total": total[i]}
      for i, (q, said) in enumerate(zip(part, replies, strict=True))
    ]

  asked = [(q.id, q.prompt, run.features.digest(q.video)) for q in queries]
  both = {"policy": variables, "reference": reference}
  return resumable.load_or_compute(
    path,
    run.watch.wrap_blocks(make),
    count=len(queries),
    batch=answering.BATCHES * sampling.batch,
    fingerprint=resumable.compute_fingerprint(
      both, sampling.cache_key(), beta, run.config.seed, run.template, asked
    ),
  )


def choose_best(
  rows: Sequence[JsonRow], by: str, count: int
) -> list[answering.VideoReply]:
  """Of the first `count` answers to each question the one with the highest reward.

  One that was cut is taken only if all were.

  Args:
    rows: of `kept`.
    by: "mean" or "total".
    count: answers to choose from.
  """
  replies = [[answering.VideoReply(*reply) for reply in row["replies"]] for row in rows]
  rewards = np.array([row[by] for row in rows])
  ended = np.array([[reply.stopped for reply in said] for said in replies])
  order = np.where(ended, rewards, rewards - np.ptp(rewards) - 1)
  chosen = np.argmax(order[:, :count], axis=1)
  return [said[i] for said, i in zip(replies, chosen, strict=True)]
