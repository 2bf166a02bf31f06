"""The packed examples of each step: those of plain batches, in fewer rows."""

from collections.abc import Callable, Sequence

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Packed
from vlmrlaif_jax.data import packing, tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import common


def of_steps(
  run: Run,
  section: str,
  log: Log,
  steps: int,
  examples: Sequence[Example],
  rows: tokenization.Rows,
) -> Callable[[int], Packed]:
  """Returns a function from a step to its packed examples on the devices.

  Every step's arrays have the shape that the fullest one needs; each process packs its
  own rows of them.

  Args:
    run: the run.
    section: of the config, with batch_size, microbatches and pack_len.
    log: receives the shape.
    steps: of the stage.
    examples: the examples.
    rows: their token rows.

  Raises:
    ValueError: an example is longer than pack_len.
  """
  config = run.config[section]
  order_of = lambda step: common.order_of(run, len(examples), config.batch_size, step)
  lengths = rows.mask.sum(axis=1)
  shape = packing.shape_of(
    (lengths[order_of(step)] for step in range(steps)),
    config.pack_len,
    multiple=sharding.row_shards(run.mesh) * config.microbatches,
    setting=f"{section}.pack_len",
  )
  log.note(
    f"{log.stage}: {config.batch_size} examples of a step, {lengths.mean():.0f} tokens "
    f"each, are packed in {shape.rows} rows of {shape.time}"
  )

  def make(step: int) -> Packed:
    order = order_of(step).tolist()
    layout = packing.first_fit(lengths[order], shape.time)
    video = lambda i: run.features.get(examples[order[i]]["video"])
    layout += [[]] * (shape.rows - len(layout))
    layout = [layout[i] for i in distributed.mine(shape.rows, run.mesh)]
    here = shape._replace(rows=len(layout))
    chosen = tokenization.Rows(*(column[order] for column in rows))
    pad = run.tokenizer.pad_token_id
    return sharding.put(packing.pack(chosen, layout, here, video, pad=pad), run.mesh)

  return make
