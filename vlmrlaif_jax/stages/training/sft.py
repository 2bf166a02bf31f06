"""The stages `sft_short` and `sft_long`: a curriculum of supervised fine-tuning.

VLM-RLAIF (2402.03746) trains on short answers first and on long answers after them.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.errors import check_at_least, user_errors
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Batch, MethodModels, PackedBatch
from vlmrlaif_jax.data import packing, pipeline, records, tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.methods import sft as method
from vlmrlaif_jax.runtime import role_params, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, Workload
from vlmrlaif_jax.stages.stage import Stage, get_row_lengths, get_stage
from vlmrlaif_jax.stages.training import common
from vlmrlaif_jax.training.job import TrainingJob

SHORT, LONG = role_params.SFT_STAGES


def default_config() -> ConfigDict:
  """Returns the settings of the section `sft`."""
  return common.default_config(
    method.default_config(),
    # Share of the records, sorted by answer length, that the first stage trains on.
    short_share=placeholder(float),
    threshold=0,  # Maximum words of a short answer; 0: use short_share.
    short_steps=placeholder(int),
    long_steps=placeholder(int),
    # Tokens of a row of packed examples; 0 disables packing.
    pack_len=placeholder(int),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `sft`; raises UserError for an invalid value."""
  with user_errors("sft"):
    check_at_least(config.sft, {"threshold": 0})
    if not 0 <= config.sft.short_share <= 1:
      raise ValueError(f"short_share must be from 0 to 1, not {config.sft.short_share}")


def make_job(run: Run, stage: str) -> TrainingJob:
  """Returns the job that trains on answers by imitation.

  SFT trains LoRA and projector of the base model. Other stages add a LoRA to the SFT
  policy.
  """
  section = get_stage(stage).section
  config, time = run.config[section], sum(get_row_lengths(run.config, section))
  if stage == SHORT:
    start, base = role_params.init_policy(run), run.base
  elif stage == LONG:
    start, base = role_params.load_policy(run, SHORT), run.base
  else:
    params, frozen = role_params.make_policy_roles(run, LONG)
    start, base = params["policy"], frozen["policy"]
  model = role_params.get_sft_model(run) if stage in (SHORT, LONG) else run.policy
  rows = config.batch_size
  update_pass = workloads.make_model_pass(run, "train", "policy", rows, time, config)
  spec: Batch | PackedBatch = specs.batch_specs(run, rows, time)
  if config.pack_len:
    spec = specs.packed_specs(run, config, rows, time)
    packed_rows, videos = spec.video.shape[:2]
    frames = update_pass.frames * videos
    update_pass = update_pass._replace(
      rows=packed_rows, time=config.pack_len, frames=frames
    )
  return common.make_training_job(
    run,
    stage,
    method=method.make(config, MethodModels(policy=model)),
    params={"policy": start},
    frozen={"policy": base},
    batch_spec=spec,
    passes={UPDATE: [update_pass]},
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains one stage of the curriculum."""
  config = run.config.sft
  easy, hard = pipeline.split_curriculum(
    run.splits.sft, short_share=config.short_share, threshold=config.threshold
  )
  answered = easy if stage == SHORT else hard
  examples, rows, problems = train_imitation(run, stage, log, answered)
  return {
    "examples": len(examples),
    "left_out": len(problems),
    "longest_answer": int(rows.loss_mask.sum(1).max()),
  }


def train_imitation(
  run: Run, stage: str, log: StageLog, examples: Sequence[Example]
) -> tuple[list[Example], tokenization.TokenRows, list[records.SkippedRecord]]:
  """Trains on the answers of examples, one per row or packed.

  Returns:
    The examples that fit, their rows, and the skipped records.
  """
  section = get_stage(stage).section
  config = run.config[section]
  outputs = common.tokenize_for_stage(run, section, examples, log, answered=True)
  examples, rows, _ = outputs
  job = make_job(run, stage)
  data: Callable[[int], Batch | PackedBatch]
  if config.pack_len:
    data = make_packed_batch_fn(run, section, log, job.schedule.steps, examples, rows)
  else:
    data = common.make_example_batch_fn(run, examples, rows, config.batch_size)
  common.fit_stage(run, log, job._replace(data=data))
  return outputs


def make_packed_batch_fn(
  run: Run,
  section: str,
  log: StageLog,
  steps: int,
  examples: Sequence[Example],
  rows: tokenization.TokenRows,
) -> Callable[[int], PackedBatch]:
  """Returns a function from a step to its packed examples on the devices.

  A step has the same examples as without packing, in fewer rows. All `steps` share the
  shape of the fullest one. Each process packs its own rows.

  Raises:
    ValueError: An example is longer than the section's pack_len.
  """
  config = run.config[section]
  get_indices = lambda step: common.batch_indices(
    run, len(examples), config.batch_size, step
  )
  lengths = rows.mask.sum(axis=1)
  shape = packing.compute_packed_shape(
    (lengths[get_indices(step)] for step in range(steps)),
    config.pack_len,
    multiple=sharding.num_batch_shards(run.mesh) * config.microbatches,
    setting=f"{section}.pack_len",
  )
  log.print_note(
    f"{log.stage}: {config.batch_size} examples per step, {lengths.mean():.0f} tokens "
    f"each, are packed in {shape.rows} rows of {shape.time} tokens"
  )

  def make(step: int) -> PackedBatch:
    indices = get_indices(step).tolist()
    layout = packing.assign_first_fit(lengths[indices], shape.time)
    get_features = lambda i: run.features.get(examples[indices[i]]["video"])
    layout += [[]] * (shape.rows - len(layout))
    layout = [layout[i] for i in distributed.local_rows(shape.rows, run.mesh)]
    local_shape = shape._replace(rows=len(layout))
    selected = tokenization.TokenRows(*(column[indices] for column in rows))
    pad = run.tokenizer.pad_token_id
    return sharding.shard_batch(
      packing.pack_rows(selected, layout, local_shape, get_features, pad=pad), run.mesh
    )

  return make


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of a stage of imitation."""
  section = get_stage(stage).section
  config = run.config[section]
  note = (
    f"  {config.batch_size} examples are packed in rows of {config.pack_len} tokens. "
    "The number of rows assumes that each example has its maximum length"
  )
  return common.make_training_workload(
    run,
    stage,
    make_job(run, stage),
    tokens=config.batch_size * sum(get_row_lengths(run.config, section)),
    note=note if config.pack_len else "",
  )


STAGES = tuple(
  Stage(
    name=name,
    title=f"Supervised fine-tuning (SFT): {length} answers",
    section="sft",
    run=train,
    check=check,
    steps=f"{length}_steps",
    workload=workload,
    paper="2402.03746",
  )
  for name, length in ((SHORT, "short"), (LONG, "long"))
)
