"""The packed examples of each step: those of plain batches, in fewer rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Packed
from vlmrlaif_jax.data import packing, pipeline, tokenization
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.runtime.run import Run

Sides = Callable[[Sequence[int]], tuple[tokenization.Rows, ...]]
_BLOCK = 1024  # Examples that are measured at once.


def of_steps(
  run: Run,
  section: str,
  log: Log,
  *,
  steps: int,
  examples: Sequence[Any],
  sides: Sides,
) -> Callable[[int], tuple[Packed, Int[np.ndarray, "batch videos"]]]:
  """From a step to its examples on the host, and the number of each place's example.

  Every step's arrays have the shape that the fullest one needs; each process has its
  own rows of them. A place without an example has the number 0.

  Args:
    section: of the config, with batch_size, microbatches and pack_len.
    steps: of the stage.
    sides: the rows of examples by their numbers, see packing.pack.

  Raises:
    ValueError: an example is longer than pack_len.
  """
  config = run.config[section]
  size, count = config.batch_size, len(examples)
  order_of = lambda step: pipeline.rows_of_step(
    count, size, seed=run.config.seed, step=step
  )
  blocks = answering.blocks(count, _BLOCK)
  lengths = np.concatenate([packing.lengths_of(sides(block)) for block in blocks])
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

  def make(step: int):
    order = order_of(step)
    given = sides(order)
    layout = packing.first_fit(lengths[order], shape.time)
    video = lambda i: run.features.get(examples[order[i]]["video"])
    layout += [[]] * (shape.rows - len(layout))
    layout = [layout[i] for i in distributed.mine(shape.rows, run.mesh)]
    here = shape._replace(rows=len(layout))
    made = packing.pack(given, layout, here, video, pad=run.tokenizer.pad_token_id)
    numbers = np.zeros((len(layout), shape.videos), np.int64)
    for row, which in zip(numbers, layout, strict=True):
      row[: len(which)] = order[which]
    return made, numbers

  return make
