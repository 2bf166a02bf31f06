"""Answers: what they depend on, and what does not fit."""

import jax
import numpy as np
import pytest

from tests.helpers import small
from vlmrlaif_jax.data.processors.llava import count_pooled_tokens
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering, loading
from vlmrlaif_jax.runtime.answering import SamplingSettings

SAMPLING = SamplingSettings(
  prompt_len=64, max_new=5, batch=4, temperature=1.0, samples=2
)


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("answer")
  return loading.create_run(
    small.config(tiny_settings), workdir, note=lambda text: None
  )


@pytest.fixture(scope="module")
def requests(run):
  return [
    JudgeQuery(e["id"], e["video"], e["question"]) for e in run.splits.prompts[:6]
  ]


@pytest.fixture(scope="module")
def replies(run, requests):
  return answering.answer_requests(run, run.base, requests, SAMPLING, seed=3)


def test_there_are_as_many_replies_as_asked_for(replies, requests):
  assert [len(each) for each in replies] == [2] * len(requests)
  assert len({reply.text for each in replies for reply in each}) > 6  # Random weights.


def test_what_is_sampled_depends_on_the_request_and_not_on_its_place(
  run, requests, replies
):
  order = np.random.default_rng(0).permutation(len(requests))
  moved = answering.answer_requests(
    run, run.base, [requests[i] for i in order], SAMPLING, seed=3
  )
  assert moved == [replies[i] for i in order]


def test_another_seed_gives_other_replies(run, requests, replies):
  assert answering.answer_requests(run, run.base, requests, SAMPLING, seed=4) != replies


def test_a_prompt_that_does_not_fit_is_told_and_harms_no_other(run, requests, replies):
  long = requests[1]._replace(prompt="What " * 100)
  asked = [requests[0], long, *requests[2:]]
  got = answering.answer_requests(run, run.base, asked, SAMPLING, seed=3)
  assert got[1] == [answering.VideoReply("", stopped=False, fits=False)] * 2
  assert got[:1] + got[2:] == replies[:1] + replies[2:]


def test_a_clip_is_shown_as_the_frames_it_has(run, requests):
  clip = [requests[0]._replace(start=1, stop=3)]
  batch, fits = answering.make_prompt_batch(run, clip * 2, prompt_len=64)
  assert fits == [True] * 2 and batch.tokens.shape == (2, 64)
  whole = run.features.get(requests[0].video)
  np.testing.assert_array_equal(batch.video[0], whole[1:3].astype(np.float32))
  count = np.sum(batch.tokens == -1, axis=1)
  np.testing.assert_array_equal(count, count_pooled_tokens(2, whole.shape[1]))


def test_rows_left_over_ask_nothing(run, requests):
  asked = [None, requests[0], None]
  batch, _ = answering.make_prompt_batch(run, asked, prompt_len=64)
  np.testing.assert_array_equal(batch.mask.any(axis=1), [False, True, False])


def test_requests_are_dealt_out_to_the_shards_of_rows():
  assert answering.deal_round_robin(6, 2).tolist() == [0, 2, 4, 1, 3, 5]


def test_many_requests_get_the_replies_of_a_few_at_a_time(run, requests, replies):
  assert len(requests) > SAMPLING.batch  # So that there are more than slots for them.
  with jax.set_mesh(run.mesh):  # Of four shards of rows.
    many = answering.answer_requests(run, run.base, requests, SAMPLING, seed=3)
  few = [
    answering.answer_requests(run, run.base, requests[i : i + 4], SAMPLING, seed=3)
    for i in (0, 4)
  ]
  assert replies == many == few[0] + few[1]


def test_ids_after_the_vocabulary_are_never_said(run):
  # The matrices have more rows than the tokenizer has ids, its last two special.
  assert len(run.tokenizer) == small.VOCAB - 4
  assert answering.get_token_ids(run)["vocab"] == small.VOCAB - 6


def test_blocks_cover_all_in_order():
  assert list(answering.split_blocks(5, 2)) == [range(0, 2), range(2, 4), range(4, 5)]
  assert list(answering.split_blocks(0, 2)) == []
