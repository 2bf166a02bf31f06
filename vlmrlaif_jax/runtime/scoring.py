"""Scores and log-probabilities of texts, as responses to examples.

`score_texts` returns the reward model's scores, `make_pairs_batch` rows for training.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.types import Batch, Groups, Params, Stops, group_rows, is_stop
from vlmrlaif_jax.data import records, tokenization
from vlmrlaif_jax.data.records import PreferenceExample
from vlmrlaif_jax.data.video import Media
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.sampling.generate import compute_response_logps

SCORING_BATCH = 64  # Texts that are scored concurrently.


def score_texts(
  run: Run,
  variables: Params,
  examples: Sequence[Mapping[str, Any]],
  texts: Sequence[str],
) -> np.ndarray:
  """Returns the reward model's score of each text, as the response to its example."""
  return score_in_batches(
    run, make_reward_scorer(run, variables), examples, texts, SCORING_BATCH
  )


def encode_reward_prompt(run: Run) -> tuple[int, ...]:
  """Returns the tokens of the reward prompt, which follows each response."""
  turn = run.prompts.reward, run.prompts.reward_reply
  return tuple(tokenization.encode_follow_up(run.tokenizer, run.template, *turn))


def make_reward_scorer(
  run: Run, variables: Params
) -> Callable[[Batch], Float[Array, " batch"]]:
  """Returns a function that computes the reward model's score of each response."""
  suffix = encode_reward_prompt(run)
  return lambda batch: _compute_scores(run.reward_model, variables, batch, suffix)


def score_in_batches(
  run: Run,
  score: Callable[[Batch], PyTree],
  examples: Sequence[Mapping[str, Any]],
  texts: Sequence[str],
  batch_size: int,
) -> PyTree:
  """Computes a score of each text in batches, as the response to its example.

  Args:
    run: the run.
    score: function of a batch on the mesh; its arrays have a row for each text.
    examples: an example for each text.
    texts: one or more responses.
    batch_size: texts per batch, rounded up to a multiple of the row shards.

  Returns:
    What `score` returns, for all texts, on the host.
  """
  size = tokenization.round_up_length(
    batch_size, multiple=sharding.num_batch_shards(run.mesh)
  )
  parts = []
  for block in answering.split_blocks(len(texts), size):
    rows = answering.pad_local_indices(run, block, size)
    batch = make_scored_batch(
      run, [examples[i] for i in rows], [texts[i] for i in rows]
    )
    parts.append(distributed.fetch_arrays(score(sharding.shard_batch(batch, run.mesh))))
  # The last batch is padded with copies of its last text.
  return jax.tree.map(lambda *each: np.concatenate(each)[: len(texts)], *parts)


@functools.lru_cache
def make_answer_logps(
  model: vlm.VLM, start: int, stops: Stops
) -> Callable[[Params, Batch], tuple[Float[Array, " batch"], Float[Array, " batch"]]]:
  """Returns a jitted function of variables and a batch of responses.

  It returns the sums of log-probabilities in nats at temperature 1: with the EOS token
  and without it; `stops` are the EOS tokens. `start` is the number of prompt columns.
  """

  def logps(variables, batch):
    each, _ = compute_response_logps(
      model, variables, batch, start=start, chunk=128, temperature=1.0
    )
    return each.sum(axis=1), jnp.where(is_stop(batch.tokens, stops), 0.0, each).sum(
      axis=1
    )

  return jax.jit(logps)


def compute_pair_accuracy(
  run: Run, variables: Params, pairs: Sequence[PreferenceExample]
) -> float:
  """Computes the share of pairs whose chosen response has the higher reward."""
  flat = [(pair, out) for pair in pairs for out in records.order_by_preference(pair)]
  examples, texts = zip(*flat, strict=True)
  scores = score_texts(run, variables, examples, texts)
  return float(np.mean(scores[0::2] > scores[1::2]))


_compute_scores = jax.jit(rewards.compute_scalar_scores, static_argnums=(0, 3))


def select_scorable(
  run: Run, pairs: Sequence[PreferenceExample]
) -> tuple[list[PreferenceExample], list[records.SkippedRecord]]:
  """Returns the pairs whose responses can be scored, and the skipped records."""
  scorable, problems = [], []
  max_prompt_len = run.config.data.prompt_len
  for pair in pairs:
    if why := run.refuse_several(pair["video"]):
      problems.append(records.SkippedRecord(pair["id"], why))
      continue
    if not run.features.has(pair["video"]):
      why = "its video cannot be read, or is of no record of the data section"
      problems.append(records.SkippedRecord(pair["id"], why))
      continue
    row = _encode_scored(run, pair, pair["output_1"])
    if tokenization.is_within_lengths(
      row, prompt_len=max_prompt_len, response_len=len(row.ids)
    ):
      scorable.append(pair)
    else:
      why = f"its prompt is longer than data.prompt_len={max_prompt_len} tokens"
      problems.append(records.SkippedRecord(pair["id"], why))
  return scorable, problems


def _encode_scored(
  run: Run, example: Mapping[str, Any], text: str
) -> tokenization.EncodedConversation:
  """Encodes a response to an example's question, truncated to data.response_len."""
  turns = [*example.get("history", []), (example["question"], text)]
  row = tokenization.encode_conversation(
    run.tokenizer,
    run.template,
    turns,
    video=run.lay_out_video(example["video"]),
  )
  return _keep_last_response(row, run.config.data.response_len)


def make_scored_batch(
  run: Run, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> Batch:
  """Returns a batch in the layout of PPO's rollouts: prompt, response and EOS."""
  encoded = [_encode_scored(run, e, t) for e, t in zip(examples, texts, strict=True)]
  return _pad_batch(run, [e["video"] for e in examples], encoded)


def _pad_batch(
  run: Run,
  videos: Sequence[Media],
  encoded: Sequence[tokenization.EncodedConversation],
  starts: Sequence[int] | None = None,
) -> Batch:
  """Pads rows to the config's lengths; for `starts`, see tokenization.pad_rows."""
  rows = tokenization.pad_rows(
    encoded,
    prompt_len=run.config.data.prompt_len,
    response_len=run.config.data.response_len,
    pad=run.tokenizer.pad_token_id,
    starts=starts,
  )
  return Batch(run.features.stack(videos), *rows)


def _keep_last_response(
  row: tokenization.EncodedConversation, max_response_len: int
) -> tokenization.EncodedConversation:
  """Moves earlier turns to the prompt and truncates the last response."""
  starts = [i for i, on in enumerate(row.learn) if on and not row.learn[i - 1]]
  learn = [on and i >= starts[-1] for i, on in enumerate(row.learn)]
  return row._replace(learn=learn).truncate(starts[-1] + max_response_len)


def make_pairs_batch(
  run: Run,
  pairs: Sequence[PreferenceExample],
  rows: Int[np.ndarray, " rows"] | Sequence[int],
) -> Groups:
  """Returns groups of a chosen and a rejected response, on the host.

  The prompt of a group is the tokens that both responses share. A tokenizer may merge
  the space before a response into its first word. A token that differs for this reason
  starts the response and is excluded from the loss.

  Args:
    run: the run.
    pairs: all pairs.
    rows: indices of the pairs in the batch.
  """
  max_response_len = run.config.data.response_len
  videos: list[Media] = []
  encoded: list[tokenization.EncodedConversation] = []
  starts: list[int] = []
  for pair in [pairs[i] for i in rows]:
    both = [_encode_scored(run, pair, out) for out in records.order_by_preference(pair)]
    start = _get_shared_prompt_len(*both)
    videos += [pair["video"]] * 2
    encoded += [row.truncate(start + max_response_len) for row in both]
    starts += [start] * 2
  start = run.config.data.prompt_len
  return group_rows(_pad_batch(run, videos, encoded, starts), group=2, start=start)


def _get_shared_prompt_len(
  first: tokenization.EncodedConversation, second: tokenization.EncodedConversation
) -> int:
  """Returns the length of the prompt that two responses share."""
  ends = min(row.learn.index(True) for row in (first, second))
  same = zip(first.ids[:ends], second.ids[:ends], strict=True)
  return next((i for i, (a, b) in enumerate(same) if a != b), ends)
