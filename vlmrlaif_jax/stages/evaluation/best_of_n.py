"""Selects the best of n answers by what the policy itself computes; no judge is needed.

With T tokens of an answer y, and the policy p_ref before RL:
  mean      (log p(y | x) - log p_ref(y | x)) / T: RLAIF-V (2405.17220, 2.4), DPO's
            implicit reward without its coefficient, which changes no order.
  total     log p(y | x) - log p_ref(y | x), which prefers short answers.
  logp      log p(y | x) / T
  ref_logp  log p_ref(y | x) / T
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.types import Batch, Params
from vlmrlaif_jax.feedback.claims import compute_self_rewards
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering, scoring
from vlmrlaif_jax.runtime.run import Run

# Functions of log p, log p_ref and the number of tokens that return what
# compute_self_rewards reads: log-probabilities, those of a reference, and lengths.
SELF_REWARDS: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
  "mean": lambda logps, ref, lengths: (logps, ref, lengths),
  "total": lambda logps, ref, lengths: (logps, ref, np.minimum(lengths, 1)),
  "logp": lambda logps, ref, lengths: (logps, np.zeros_like(ref), lengths),
  "ref_logp": lambda logps, ref, lengths: (ref, np.zeros_like(ref), lengths),
}


def load_or_sample_candidates(
  run: Run,
  variables: Params,
  reference: Params,
  queries: Sequence[JudgeQuery],
  sampling: answering.SamplingSettings,
  path: pathlib.Path,
) -> list[JsonRow]:
  """Samples answers to each question and computes their rewards, or reads them.

  Args:
    run: The run.
    variables: Variables of run.policy after RL.
    reference: Variables of run.policy before RL.
    queries: Questions.
    sampling: Sampling settings, with the number of answers.
    path: File that caches the result for these weights and settings.

  Returns:
    A row for each question: its "replies", and their rewards by the name of each of
    SELF_REWARDS.
  """
  queries = [query._replace(id=f"best:{query.id}") for query in queries]
  score_replies = _make_reply_scorer(run, variables, reference)

  def make_rows(block: range) -> list[JsonRow]:
    part = [queries[i] for i in block]
    replies = answering.Answerer(run, variables, sampling).generate_replies(part)
    rewards = score_replies(part, replies)
    return [
      {"id": q.id, "replies": samples}
      | {name: values[i].tolist() for name, values in rewards.items()}
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
      [*SELF_REWARDS],
      run.config.seed,
      run.template,
      run.stops,
      facts,
    ),
  )


def _make_reply_scorer(run: Run, variables: Params, reference: Params):
  """Returns a function from queries and replies to the rewards by name."""
  logps_fn = scoring.make_answer_logps(
    run.policy, run.config.data.prompt_len, run.stops
  )

  def score(batch: Batch):
    whole = [logps_fn(each, batch)[0] for each in (variables, reference)]
    return (*whole, batch.loss_mask.sum(axis=1))

  def score_replies(
    queries: Sequence[JudgeQuery], replies: Sequence[Sequence[answering.VideoReply]]
  ) -> dict[str, np.ndarray]:
    flat = [
      (q, x.text) for q, samples in zip(queries, replies, strict=True) for x in samples
    ]
    examples = [{"video": q.video, "question": q.prompt} for q, _ in flat]
    texts = [text for _, text in flat]
    scores = scoring.score_in_batches(
      run, score, examples, texts, scoring.SCORING_BATCH
    )
    scores = [each.reshape(len(queries), -1) for each in scores]
    return {
      name: compute_self_rewards(*select(*scores), beta=1.0)
      for name, select in SELF_REWARDS.items()
    }

  return score_replies


def choose_best(
  rows: Sequence[JsonRow], by: str, count: int
) -> list[answering.VideoReply]:
  """Returns the best of the first `count` answers to each question, by reward.

  A truncated answer is returned only if all are truncated.

  Args:
    rows: Output of load_or_sample_candidates.
    by: Name of a reward in the rows.
    count: Number of answers to choose from.
  """
  replies = [[answering.VideoReply(*reply) for reply in row["replies"]] for row in rows]
  rewards = np.array([row[by] for row in rows])
  ended = np.array([[reply.stopped for reply in samples] for samples in replies])
  order = np.where(ended, rewards, rewards - np.ptp(rewards) - 1)
  chosen = np.argmax(order[:, :count], axis=1)
  return [samples[i] for samples, i in zip(replies, chosen, strict=True)]
