"""The packed examples of each step: those of plain batches, in fewer rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Packed
from vlmrlaif_jax.data import packing, pipeline, tokenization
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.runtime.run import Run

Select = Callable[[Sequence[int]], tokenization.Rows]
_BLOCK = 1024  # Examples that are measured at once.


def of_steps(
  run: Run,
  section: str,
  log: Log,
  *,
  steps: int,
  examples: Sequence[Any],
  rows: Select,
) -> Callable[[int], Packed]:
  """Returns a function from a step to its packed examples on the host.

  Every step's arrays have the shape that the fullest one needs; each process has its
  own rows of them.

  Args:
    section: of the config, with batch_size, microbatches and pack_len.
    steps: of the stage.
    rows: the token rows of examples by their numbers.

  Raises:
    ValueError: an example is longer than pack_len.
  """
  config = run.config[section]
  size, count = config.batch_size, len(examples)
  order_of = lambda step: pipeline.rows_of_step(
    count, size, seed=run.config.seed, step=step
  )
  blocks = answering.blocks(count, _BLOCK)
  lengths = np.concatenate([rows(block).mask.sum(axis=1) for block in blocks])
  shape = packing.shape_of(
    (lengths[order_of(step)] for step in range(steps)),
    config.pack_len,
    multiple=sharding.row_shards(run.mesh) * config.microbatches,
    setting=f"{section}.pack_len",
  )
  log.note(
    f"{log.stage}: {size} examples of a step, {lengths.mean():.0f} tokens each, are "
    f"packed in {shape.rows} rows of {shape.time}"
  )

  def make(step: int) -> Packed:
    order = order_of(step).tolist()
    layout = packing.first_fit(lengths[order], shape.time)
    video = lambda i: run.features.get(examples[order[i]]["video"])
    layout += [[]] * (shape.rows - len(layout))
    layout = [layout[i] for i in distributed.mine(shape.rows, run.mesh)]
    here = shape._replace(rows=len(layout))
    pad = run.tokenizer.pad_token_id
    return packing.pack(rows(order), layout, here, video, pad=pad)

  return make
