"""Questions that share a row, against each question in a row of its own."""

import numpy as np
import pytest

from tests.helpers.stage_runs import untrained_policy
from tests.methods.roles import noisy
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch, merge_params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.templates import MEDIA_MARK
from vlmrlaif_jax.feedback.claims import normalize_yes_no
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.stages.labeling import claim_probabilities


@pytest.fixture(scope="module")
def variables(one):
  """Of a policy whose LoRA counts."""
  return merge_params(one.base, noisy(untrained_policy(one), 3, 0.3))


@pytest.fixture(scope="module")
def queries(one):
  """About two videos by turns, with and without a turn before; of several lengths."""
  videos = [e["video"] for e in one.splits.prompts]
  first, second = dict.fromkeys(videos[:1] + videos[-1:])
  turn = (("What shape is the red object?", "The red object is a ring."),)
  return [
    JudgeQuery("0", first, "Is there a red object?"),
    JudgeQuery("1", second, "Is there a blue object in the video?"),
    JudgeQuery("2", first, "Is your last answer right?", turn),
    JudgeQuery("3", second, "Is your last answer right?", turn),
    JudgeQuery("4", first, "Does the green ring move?", turn * 2),
    JudgeQuery("5", second, f"Is it blue? {MEDIA_MARK}"),
  ]


def alone(run, variables, query):
  """As one conversation, with nothing beside it."""
  turns = [*query.history, (query.prompt, None)]
  row = answering.encode_prompt(run, turns, run.lay_out_video(query.video))
  rows = tokenization.pad_rows(
    [row], prompt_len=len(row.ids), response_len=0, pad=run.tokenizer.pad_token_id
  )
  batch = Batch(run.features.stack([query.video]), *rows)
  hidden = run.policy.apply(
    variables, sharding.shard_batch(batch, run.mesh), method="hidden"
  )
  logits = run.policy.apply(variables, hidden[:, -1], method="compute_logits")
  words = (
    claim_probabilities.find_word_ids(run.tokenizer, w)
    for w in (claim_probabilities.YES, claim_probabilities.NO)
  )
  return np.asarray(normalize_yes_no(logits, *words))[0]


@pytest.mark.parametrize("length", [400, 130])
def test_shared_rows_change_nothing(one, variables, queries, length):
  made = claim_probabilities.compute_yes_no_probs(
    one, variables, queries, length=length, rows=2
  )
  expected = [alone(one, variables, query) for query in queries]
  np.testing.assert_allclose(made, expected, rtol=2e-4)
  assert np.ptp(np.array(expected)[:, 0]) > 1e-4  # They differ at all.


def test_a_video_stands_in_a_row_once(one, queries):
  rows = claim_probabilities.pack_queries(one, queries, 400)
  assert [row.numbers for row in rows] == [[0, 2, 4], [1, 3], [5]]
  shorter = claim_probabilities.pack_queries(one, queries, len(rows[0].ids) - 1)
  assert [row.numbers for row in shorter] == [[0, 2], [1, 3], [4], [5]]


def test_what_does_not_fit_has_no_answer(one, variables, queries):
  rows = [
    len(
      answering.encode_prompt(
        one, [*q.history, (q.prompt, None)], one.lay_out_video(q.video)
      ).ids
    )
    for q in queries
  ]
  made = claim_probabilities.compute_yes_no_probs(
    one, variables, queries, length=max(rows) - 1, rows=2
  )
  assert [pair is None for pair in made] == [n == max(rows) for n in rows]


def test_nothing_asked_is_nothing_answered(one, variables):
  assert (
    claim_probabilities.compute_yes_no_probs(one, variables, [], length=90, rows=2)
    == []
  )


def test_words_are_single_tokens_with_or_without_a_space(one):
  ids = claim_probabilities.find_word_ids(one.tokenizer, claim_probabilities.YES)
  assert {one.tokenizer.decode([i]).strip() for i in ids} == {"Yes"}


def test_a_tokenizer_without_the_words_is_refused(one):
  with pytest.raises(ValueError, match="no token that is Indubitably"):
    claim_probabilities.find_word_ids(one.tokenizer, ("Indubitably",))
