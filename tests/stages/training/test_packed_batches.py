"""The packed examples of a step: those of the plain one, from the same files."""

import io

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.stages.training import common, sft


@pytest.fixture
def log(tmp_path):
  with StageLog(tmp_path, "sft", 1, resume_from=None, stream=io.StringIO()) as log:
    yield log


def packing(run, section, pack_len):
  config = ConfigDict(run.config.to_dict())
  config[section].pack_len = pack_len
  return run._replace(config=config)


def segments(rows):
  """The ids of each segment, and which of them are learned."""
  return [
    (row[ids == i].tolist(), learn[ids == i].tolist())
    for row, ids, learn in zip(rows.tokens, rows.segments, rows.loss_mask, strict=True)
    for i in range(1, ids.max() + 1)
  ]


def real(batch):
  return [
    (row[mask].tolist(), learn[mask].tolist())
    for row, mask, learn in zip(*map(np.asarray, batch[1:4]), strict=True)
  ]


def test_a_step_of_sft_has_the_examples_of_the_plain_one(one, log):
  run = packing(one, "sft", 256)
  kept, rows, _ = common.tokenize_for_stage(
    run, "sft", run.splits.sft, log, answered=True
  )
  made = sft.make_packed_batch_fn(run, "sft", log, 3, kept, rows)
  batches = common.make_example_batch_fn(run, kept, rows, run.config.sft.batch_size)
  for step in range(3):
    data, plain = jax.device_get((made(step), batches(step)))
    assert sorted(segments(data)) == sorted(real(plain))
    assert len(data.tokens) < len(plain.tokens)
    used = data.video[data.video.any(axis=(2, 3, 4))]
    whole = lambda videos: sorted(video.tobytes() for video in np.asarray(videos))
    assert whole(used) == whole(plain.video)


def test_a_row_too_short_for_an_example_is_refused_by_its_setting(one, log):
  run = packing(one, "sft", 20)
  kept, rows, _ = common.tokenize_for_stage(
    run, "sft", run.splits.sft, log, answered=True
  )
  with pytest.raises(ValueError, match="sft.pack_len=20"):
    sft.make_packed_batch_fn(run, "sft", log, 1, kept, rows)
