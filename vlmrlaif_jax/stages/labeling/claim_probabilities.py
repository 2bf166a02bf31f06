"""Computes P(yes) and P(no) for questions about videos, many per forward pass.

The questions about a video share one row and one copy of the video. Each question
attends to the video and to itself, and its positions start after the video's. The
logits are therefore those of a row with one question.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, Params
from vlmrlaif_jax.data import features, tokenization
from vlmrlaif_jax.feedback.claims import YesNoProbs, normalize_yes_no
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.runtime.run import Run

PADDING, SHARED = -1, 0  # Segments; questions are counted from 1.
YES, NO = ("Yes", "yes"), ("No", "no")


class PackedQuestions(NamedTuple):
  """A row: the shared video tokens, followed by the questions."""

  numbers: list[int]  # Indices of the queries.
  ids: list[int]
  segments: list[int]
  positions: list[list[int]]
  ends: list[int]  # Index of the last token of each question.


def compute_yes_no_probs(
  run: Run,
  variables: Params,
  queries: Sequence[JudgeQuery],
  *,
  length: int,
  rows: int,
) -> list[YesNoProbs | None]:
  """Computes the probabilities of yes and of no for each query.

  Args:
    run: The run.
    variables: Variables of run.policy.
    queries: Questions about videos.
    length: Tokens of a row, video included.
    rows: Rows per batch.

  Returns:
    The pair of probabilities for each query, None if the query does not fit.
  """
  packed = pack_queries(run, queries, length)
  yes, no = (find_word_ids(run.tokenizer, words) for words in (YES, NO))
  max_questions = max((len(row.numbers) for row in packed), default=0)
  max_questions = tokenization.round_up_length(max_questions, multiple=16)
  probs: list[YesNoProbs | None] = [None] * len(queries)
  rows = tokenization.round_up_length(
    rows, multiple=sharding.num_batch_shards(run.mesh)
  )
  for block in answering.split_blocks(len(packed), rows):
    selected = [packed[i] for i in answering.pad_local_indices(run, block, rows)]
    data = _stack_rows(run, queries, selected, length, max_questions)
    outputs = distributed.fetch_arrays(
      _compute_batch_probs(run.policy, variables, *data, yes, no)
    )
    for row, row_probs in zip((packed[i] for i in block), outputs, strict=False):
      for number, pair in zip(row.numbers, row_probs.tolist(), strict=False):
        probs[number] = tuple(pair)
  return probs


def find_word_ids(tokenizer, words: Sequence[str]) -> tuple[int, ...]:
  """Returns the ids of tokens that are a word, with or without a space before it.

  Raises:
    ValueError: There is no such token.
  """
  word_ids = set()
  for spelled in [space + word for word in words for space in ("", " ")]:
    ids = tokenizer(spelled, add_special_tokens=False).input_ids
    if len(ids) == 1:
      word_ids.add(ids[0])
  if not word_ids:
    raise ValueError(
      f"the tokenizer has no token that is {' or '.join(words)}: set "
      "--config.claims.labeler=endpoint for another model as the labeler"
    )
  return tuple(sorted(word_ids))


def pack_queries(
  run: Run, queries: Sequence[JudgeQuery], length: int
) -> list[PackedQuestions]:
  """Packs queries into rows by video, in order.

  Queries share a row if they are equal up to the last feature of their videos.
  Queries that are too long are left out.
  """
  rows: list[PackedQuestions] = []
  open_rows: dict[tuple[str, tuple[int, ...]], PackedQuestions] = {}
  for number, query in enumerate(queries):
    turns = [*query.history, (query.prompt, None)]
    video = run.lay_out_video(query.video)
    ids, _, positions = answering.encode_prompt(run, turns, video)
    shared_len = len(ids) - ids[::-1].index(VIDEO_TOKEN)
    if len(ids) > length:
      continue
    name = features.format_video_name(query.video), tuple(ids[:shared_len])
    row = open_rows.get(name)
    if row is None or len(row.ids) + len(ids) - shared_len > length:
      shared = positions[:shared_len].tolist()
      row = PackedQuestions([], ids[:shared_len], [SHARED] * shared_len, shared, [])
      open_rows[name] = row
      rows.append(row)
    row.numbers.append(number)
    row.ids.extend(ids[shared_len:])
    row.segments.extend([len(row.numbers)] * (len(ids) - shared_len))
    row.positions.extend(positions[shared_len:].tolist())
    row.ends.append(len(row.ids) - 1)
  return rows


def _stack_rows(
  run, queries, rows: Sequence[PackedQuestions], length: int, max_questions: int
):
  """Returns the batch, segments and ends of rows, on the devices."""
  pad = run.tokenizer.pad_token_id
  pad_lists = lambda lists, size, fill: np.array(
    [each + [fill] * (size - len(each)) for each in lists], np.int32
  )
  segments = pad_lists([row.segments for row in rows], length, PADDING)
  mask, axes = segments != PADDING, len(rows[0].positions[0])
  videos = [queries[row.numbers[0]].video for row in rows]
  batch = Batch(
    run.features.stack(videos),
    pad_lists([row.ids for row in rows], length, pad),
    mask,
    np.zeros_like(mask),
    pad_lists([row.positions for row in rows], length, [0] * axes),
  )
  ends = pad_lists([row.ends for row in rows], max_questions, 0)
  return sharding.shard_batch((batch, segments, ends), run.mesh)


def make_question_mask(
  segments: Int[Array, "batch time"],
) -> Bool[Array, "batch time time"]:
  """Computes attention to the shared tokens and to the same question."""
  own = segments[:, :, None] == segments[:, None, :]
  shared = segments[:, None, :] == SHARED
  causal = jnp.tri(segments.shape[1], dtype=bool)
  return (own | shared) & causal & (segments != PADDING)[:, None, :]


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _compute_batch_probs(
  model: Any,
  variables: Params,
  batch: Batch,
  segments: Int[Array, "batch time"],
  ends: Int[Array, "batch questions"],
  yes: tuple[int, ...],
  no: tuple[int, ...],
) -> Float[Array, "batch questions 2"]:
  # The fused kernels support the causal mask only.
  model = model.clone(llm=model.llm.clone(attention="xla"))
  hidden = model.apply(variables, batch, make_question_mask(segments), method="hidden")
  last = jnp.take_along_axis(hidden, ends[..., None], axis=1)
  logits = model.apply(variables, last, method="compute_logits")
  return normalize_yes_no(logits, yes, no)
