"""The packed examples of a step: those of the plain one, from the same files."""

import io

import numpy as np
import pytest
from ml_collections import ConfigDict

from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import in_rows
from vlmrlaif_jax.data import records, tokenization
from vlmrlaif_jax.runtime import scoring, video_features
from vlmrlaif_jax.stages.training import common, packed_batches, supervised


@pytest.fixture
def log(tmp_path):
  with Log(tmp_path, "sft", 1, resume_from=None, stream=io.StringIO()) as log:
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
    for row, mask, learn in zip(*map(np.asarray, batch[1:]), strict=True)
  ]


def test_a_step_of_sft_has_the_examples_of_the_plain_one(one, log):
  run = packing(one, "sft", 256)
  kept, rows, _ = common.encoded(
    run, run.splits.sft, log, answered=True, response_len=48
  )
  sides = lambda numbers: (tokenization.Rows(*(x[numbers] for x in rows)),)
  made = packed_batches.of_steps(run, "sft", log, steps=3, examples=kept, sides=sides)
  for step in range(3):
    data, numbers = made(step)
    plain = common.batch_of(run, kept, rows, run.config.sft.batch_size, step)
    assert sorted(segments(data)) == sorted(real(plain))
    assert len(data.tokens) < len(plain.tokens)
    used = data.video.any(axis=(2, 3, 4))
    videos = video_features.stack_features(
      run.features, [kept[i]["video"] for i in numbers[used]]
    )
    np.testing.assert_array_equal(data.video[used], videos)


def test_a_step_of_the_reward_model_has_the_pairs_of_the_plain_one(one, log):
  run = packing(one, "rm", 512)
  source, videos = run.config.rm.preferences, run.config.data.videos
  pairs, _ = scoring.scorable(run, records.read_preferences(source, videos=videos)[0])
  data = supervised.rm_data(run, log, pairs)(0)
  plain = scoring.pairs_of_step(run, pairs, run.config.rm.batch_size, 0)
  got = segments(data)
  rows = real(in_rows(plain))
  want = zip(rows[::2], rows[1::2], strict=True)
  assert sorted(zip(got[::2], got[1::2], strict=True)) == sorted(want)
  assert len(data.tokens) < len(rows)


def test_a_row_too_short_for_an_example_is_refused_by_its_setting(one, log):
  run = packing(one, "dpo", 20)
  source, videos = run.config.rm.preferences, run.config.data.videos
  pairs, _ = records.read_preferences(source, videos=videos)
  sides = lambda numbers: scoring.pair_rows(run, pairs, numbers)
  with pytest.raises(ValueError, match="dpo.pack_len=20 tokens are fewer than"):
    packed_batches.of_steps(run, "dpo", log, steps=1, examples=pairs, sides=sides)
