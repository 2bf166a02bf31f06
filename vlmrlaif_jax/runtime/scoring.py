"""Texts as answers: as rows of a batch, their scores, their log-probabilities."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.types import Batch, Groups, Params, group_rows
from vlmrlaif_jax.data import records, tokenization
from vlmrlaif_jax.data.records import PreferenceExample
from vlmrlaif_jax.data.video import VideoPath
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
  """The reward model's score of each text as the answer to each example."""
  return score_in_batches(
    run, make_reward_scorer(run, variables), examples, texts, SCORING_BATCH
  )


def encode_reward_prompt(run: Run) -> tuple[int, ...]:
  """Returns the tokens of the reward prompt, which follows each response."""
  return tuple(tokenization.encode_suffix(run.tokenizer, run.prompts.reward))


def make_reward_scorer(
  run: Run, variables: Params
) -> Callable[[Batch], Float[Array, " batch"]]:
  """From a batch to the reward model's score of each response."""
  suffix = encode_reward_prompt(run)
  return lambda batch: _scores(run.reward_model, variables, batch, suffix)


def score_in_batches(
  run: Run,
  score: Callable[[Batch], PyTree],
  examples: Sequence[Mapping[str, Any]],
  texts: Sequence[str],
  batch_size: int,
) -> PyTree:
  """What `score` says of each text as the answer to each example, on the host.

  Args:
    score: of a batch on the mesh; each of its arrays has a row for each text.
    texts: at least one.
  """
  size = tokenization.round_up_length(
    batch_size, multiple=sharding.num_batch_shards(run.mesh)
  )
  made = []
  for block in answering.split_blocks(len(texts), size):
    rows = answering.pad_local_indices(run, block, size)
    batch = make_scored_batch(
      run, [examples[i] for i in rows], [texts[i] for i in rows]
    )
    made.append(distributed.fetch_arrays(score(sharding.shard_batch(batch, run.mesh))))
  # The last block is filled up.
  return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(texts)], *made)


@functools.lru_cache
def make_answer_logps(
  model: vlm.VLM, start: int, eos: int
) -> Callable[[Params, Batch], tuple[Float[Array, " batch"], Float[Array, " batch"]]]:
  """From variables and a batch to log p of each answer at temperature 1, in nats: with
  its end token, and without.
  """

  def logps(variables, batch):
    each, _ = compute_response_logps(
      model, variables, batch, start=start, chunk=128, temperature=1.0
    )
    return each.sum(axis=1), jnp.where(batch.tokens == eos, 0.0, each).sum(axis=1)

  return jax.jit(logps)


def compute_pair_accuracy(
  run: Run, variables: Params, pairs: Sequence[PreferenceExample]
) -> float:
  """How often the reward model scores the chosen answer higher."""
  flat = [(pair, out) for pair in pairs for out in records.order_by_preference(pair)]
  examples, texts = zip(*flat, strict=True)
  scores = score_texts(run, variables, examples, texts)
  return float(np.mean(scores[0::2] > scores[1::2]))


_scores = jax.jit(rewards.compute_scalar_scores, static_argnums=(0, 3))


def select_scorable(
  run: Run, pairs: Sequence[PreferenceExample]
) -> tuple[list[PreferenceExample], list[records.SkippedRecord]]:
  """(pairs whose answers can be scored, problems of the others)."""
  kept, problems = [], []
  longest = run.config.data.prompt_len
  for pair in pairs:
    row = _scored_row(run, pair, pair["output_1"])
    why = ""
    if not run.features.has(pair["video"]):
      why = "its video cannot be read, or is of no record of the data section"
    elif not tokenization.is_within_lengths(
      row, prompt_len=longest, response_len=len(row.ids)
    ):
      why = f"its prompt is longer than data.prompt_len={longest} tokens"
    if why:
      problems.append(records.SkippedRecord(pair["id"], why))
    else:
      kept.append(pair)
  return kept, problems


def _scored_row(
  run: Run, example: Mapping[str, Any], answered: str
) -> tokenization.EncodedConversation:
  """A text as the answer to an example's question, cut where sampling would stop."""
  turns = [*example.get("history", []), (example["question"], answered)]
  row = tokenization.encode_conversation(
    run.tokenizer,
    run.template,
    turns,
    video_tokens=run.policy.video_tokens(run.config.model.frames),
  )
  return _only_last_answer(row, run.config.data.response_len)


def make_scored_batch(
  run: Run, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> Batch:
  """Rows as PPO's rollouts lay them out: prompt, answer and its end."""
  encoded = [_scored_row(run, e, t) for e, t in zip(examples, texts, strict=True)]
  return _padded(run, [e["video"] for e in examples], encoded)


def _padded(
  run: Run,
  videos: Sequence[VideoPath],
  encoded: Sequence[tokenization.EncodedConversation],
  starts: Sequence[int] | None = None,
) -> Batch:
  """Rows of the config's lengths; for `starts`, see tokenization.pad_rows."""
  rows = tokenization.pad_rows(
    encoded,
    prompt_len=run.config.data.prompt_len,
    response_len=run.config.data.response_len,
    pad=run.tokenizer.pad_token_id,
    starts=starts,
  )
  return Batch(run.features.stack(videos), *rows)


def _only_last_answer(
  row: tokenization.EncodedConversation, longest: int
) -> tokenization.EncodedConversation:
  """Earlier turns made part of the prompt, and an answer cut as sampling would."""
  starts = [i for i, on in enumerate(row.learn) if on and not row.learn[i - 1]]
  learn = [on and i >= starts[-1] for i, on in enumerate(row.learn)]
  stop = starts[-1] + longest
  return tokenization.EncodedConversation(row.ids[:stop], learn[:stop])


def make_pairs_batch(
  run: Run,
  pairs: Sequence[PreferenceExample],
  rows: Int[np.ndarray, " rows"] | Sequence[int],
) -> Groups:
  """The pairs of these numbers, on the host: groups of chosen and rejected.

  Their prompt is what both begin with. A tokenizer may read the space before an answer
  by itself or as part of a word: such a token then stands at the answer's front,
  and is not learned.
  """
  longest = run.config.data.response_len
  videos: list[VideoPath] = []
  encoded: list[tokenization.EncodedConversation] = []
  starts: list[int] = []
  for pair in [pairs[i] for i in rows]:
    both = [_scored_row(run, pair, out) for out in records.order_by_preference(pair)]
    start = _shared_prompt(*both)
    videos += [pair["video"]] * 2
    encoded += [
      tokenization.EncodedConversation(
        r.ids[: start + longest], r.learn[: start + longest]
      )
      for r in both
    ]
    starts += [start] * 2
  start = run.config.data.prompt_len
  return group_rows(_padded(run, videos, encoded, starts), group=2, start=start)


def _shared_prompt(
  first: tokenization.EncodedConversation, second: tokenization.EncodedConversation
) -> int:
  """The length of the prompt that two answers have in common."""
  ends = min(row.learn.index(True) for row in (first, second))
  same = zip(first.ids[:ends], second.ids[:ends], strict=True)
  return next((i for i, (a, b) in enumerate(same) if a != b), ends)
