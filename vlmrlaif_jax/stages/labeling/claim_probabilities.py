"""A model's P(yes) and P(no) to questions about videos, many of them in one forward.

The questions about a video stand in one row, behind the one copy of it: each sees the
video and itself, and its positions go on from the video's. To the model each looks
like a row of its own.
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

PADDING, SHARED = -1, 0  # Segments; those of questions are counted from 1.
YES, NO = ("Yes", "yes"), ("No", "no")


class PackedQuestions(NamedTuple):
  """A row: what its questions share, and the questions one after another."""

  numbers: list[int]  # Of the queries.
  ids: list[int]
  segments: list[int]
  positions: list[int]
  ends: list[int]  # Where each question ends.


def compute_yes_no_probs(
  run: Run,
  variables: Params,
  queries: Sequence[JudgeQuery],
  *,
  length: int,
  rows: int,
) -> list[YesNoProbs | None]:
  """The probabilities of yes and of no to each query; None where it does not fit.

  Args:
    variables: of run.policy.
    length: tokens of a row, the video included.
    rows: at once.
  """
  packed = pack_queries(run, queries, length)
  yes, no = (find_word_ids(run.tokenizer, words) for words in (YES, NO))
  most = max((len(row.numbers) for row in packed), default=0)
  found: list[YesNoProbs | None] = [None] * len(queries)
  rows = tokenization.round_up_length(
    rows, multiple=sharding.num_batch_shards(run.mesh)
  )
  for part in answering.split_blocks(len(packed), rows):
    chosen = [packed[i] for i in answering.pad_local_indices(run, part, rows)]
    data = _arrays(
      run, queries, chosen, length, tokenization.round_up_length(most, multiple=16)
    )
    made = distributed.fetch_arrays(_chances(run.policy, variables, *data, yes, no))
    for row, chances in zip((packed[i] for i in part), made, strict=False):
      for number, pair in zip(row.numbers, chances.tolist(), strict=False):
        found[number] = tuple(pair)
  return found


def find_word_ids(tokenizer, words: Sequence[str]) -> tuple[int, ...]:
  """Ids of the tokens that are one of these words, with or without a space before.

  Raises:
    ValueError: no token is, so that nothing can be read from the first one.
  """
  found = set()
  for spelled in [space + word for word in words for space in ("", " ")]:
    ids = tokenizer(spelled, add_special_tokens=False).input_ids
    if len(ids) == 1:
      found.add(ids[0])
  if not found:
    raise ValueError(
      f"the tokenizer has no token that is {' or '.join(words)}: let another model "
      "answer the questions (claims.labeler=endpoint)"
    )
  return tuple(sorted(found))


def pack_queries(
  run: Run, queries: Sequence[JudgeQuery], length: int
) -> list[PackedQuestions]:
  """Queries in rows, in their order within each video; what is too long is in none."""
  rows: list[PackedQuestions] = []
  open_rows: dict[str, PackedQuestions] = {}
  count = run.policy.count_video_tokens(run.config.model.frames)
  for number, query in enumerate(queries):
    turns = [*query.history, (query.prompt, None)]
    ids = answering.encode_prompt(run, turns, video_tokens=count).ids
    head = len(ids) - ids[::-1].index(VIDEO_TOKEN)
    if len(ids) > length:
      continue
    name = features.format_video_name(query.video)
    row = open_rows.get(name)
    if row is None or len(row.ids) + len(ids) - head > length:
      shared = list(range(head))
      row = PackedQuestions([], ids[:head], [SHARED] * head, shared, [])
      open_rows[name] = row
      rows.append(row)
    row.numbers.append(number)
    row.ids.extend(ids[head:])
    row.segments.extend([len(row.numbers)] * (len(ids) - head))
    row.positions.extend(range(head, len(ids)))
    row.ends.append(len(row.ids) - 1)
  return rows


def _arrays(run, queries, rows: Sequence[PackedQuestions], length: int, most: int):
  """(batch, segments, positions, ends) of rows, on the devices."""
  pad = run.tokenizer.pad_token_id
  wide = lambda lists, size, fill: np.array(
    [each + [fill] * (size - len(each)) for each in lists], np.int32
  )
  segments = wide([row.segments for row in rows], length, PADDING)
  real = segments != PADDING
  videos = [queries[row.numbers[0]].video for row in rows]
  batch = Batch(
    run.features.stack(videos),
    wide([row.ids for row in rows], length, pad),
    real,
    np.zeros_like(real),
  )
  positions = wide([row.positions for row in rows], length, 0)
  ends = wide([row.ends for row in rows], most, 0)
  return sharding.shard_batch((batch, segments, positions, ends), run.mesh)


def make_question_mask(
  segments: Int[Array, "batch time"],
) -> Bool[Array, "batch time time"]:
  """Which tokens each token sees: the shared ones and those of its own question."""
  own = segments[:, :, None] == segments[:, None, :]
  shared = segments[:, None, :] == SHARED
  causal = jnp.tri(segments.shape[1], dtype=bool)
  return (own | shared) & causal & (segments != PADDING)[:, None, :]


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _chances(
  model: Any,
  variables: Params,
  batch: Batch,
  segments: Int[Array, "batch time"],
  positions: Int[Array, "batch time"],
  ends: Int[Array, "batch questions"],
  yes: tuple[int, ...],
  no: tuple[int, ...],
) -> Float[Array, "batch questions 2"]:
  # The kernels know of no mask but the causal one.
  model = model.clone(llm=model.llm.clone(attention="xla"))
  hidden = model.apply(
    variables, batch, positions, make_question_mask(segments), method="hidden"
  )
  last = jnp.take_along_axis(hidden, ends[..., None], axis=1)
  logits = model.apply(variables, last, method="compute_logits")
  return normalize_yes_no(logits, yes, no)
