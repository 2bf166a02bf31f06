"""Rows of the reward model: of PPO's layout, scored alike wherever they are scored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.rows import text_batch
from vlmrlaif_jax.core.types import Batch
from vlmrlaif_jax.data import pipeline, tokenization
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.runtime import role_params, scoring

TEXTS = ["Yes.", "The small red ring moves left.", "Word " * 40, ""]


@pytest.fixture(scope="module")
def examples(one):
  return one.splits.prompts[: len(TEXTS)]


@pytest.fixture(scope="module")
def ppo_rows(one, examples):
  """What a policy that says TEXTS leaves behind, laid out as generate does."""
  data, tok = one.config.data, one.tokenizer
  kept, rows, _ = pipeline.tokenize_examples(
    examples, tok, one.template, answered=False, response_len=0,
    lay_out=one.lay_out_video,
    prompt_len=data.prompt_len,
  )  # fmt: skip
  assert len(kept) == len(TEXTS)
  widen = lambda x, fill: np.pad(
    x, [(0, 0), (0, data.response_len)], constant_values=fill
  )
  tokens, mask = widen(rows.tokens, tok.pad_token_id), widen(rows.mask, False)
  loss_mask = np.zeros_like(mask)
  for i, said in enumerate(TEXTS):
    ids = [*tokenization.encode_suffix(tok, f" {said}"), one.stops[0]] if said else None
    ids = (ids or [one.stops[0]])[: data.response_len]
    here = slice(data.prompt_len, data.prompt_len + len(ids))
    tokens[i, here], mask[i, here], loss_mask[i, here] = ids, True, True
  video = one.features.stack(e["video"] for e in examples)
  return text_batch(video, tokens, mask, loss_mask)


def test_rows_of_reward_model_and_ppo_have_one_layout(one, examples, ppo_rows):
  scored = scoring.make_scored_batch(one, examples, TEXTS)
  for name, got, want in zip(Batch._fields, scored, ppo_rows, strict=True):
    np.testing.assert_array_equal(got, want, name)
  assert scored.loss_mask.sum(axis=1).max() == one.config.data.response_len


def test_the_same_text_scores_the_same_in_training_ppo_and_evaluation(
  one, examples, ppo_rows
):
  variables = role_params.load_reward_model(one)
  suffix = scoring.encode_reward_prompt(one)
  score = rewards.make_model_score(one.reward_model, suffix)
  in_ppo, _ = jax.jit(score)({"reward": variables}, jax.tree.map(jnp.asarray, ppo_rows))
  pairs = [
    {**e, "output_1": said, "output_2": "No.", "preference": 1}
    for e, said in zip(examples, TEXTS, strict=True)
  ]
  order = pipeline.shuffled_row_indices(len(pairs), len(pairs), seed=0, step=0)
  both = rewards.append_suffix(scoring.make_pairs_batch(one, pairs, order), suffix)
  both = jax.tree.map(jnp.asarray, both)
  in_training = one.reward_model.apply(
    variables, both, shared=True, method="group_scores"
  )
  evaluated = scoring.score_texts(one, variables, examples, TEXTS)
  assert np.ptp(evaluated) > 0.01
  np.testing.assert_allclose(in_ppo, evaluated, atol=5e-5)
  np.testing.assert_allclose(in_training[:, 0], evaluated[order], atol=5e-5)


def test_scores_do_not_depend_on_the_batch(one, examples):
  scores = scoring.make_reward_scorer(one, role_params.load_reward_model(one))
  score = functools.partial(scoring.score_in_batches, one, scores, examples, TEXTS)
  np.testing.assert_allclose(score(batch_size=3), score(batch_size=8), atol=5e-5)


def test_only_the_last_answer_is_scored(one, examples):
  history = [("Red?", "No.")]
  plain = {**examples[0], "question": "Blue?"}
  later = {**plain, "history": history}
  batch = scoring.make_scored_batch(one, [plain, later], ["No.", "No."])
  np.testing.assert_array_equal(batch.loss_mask[0], batch.loss_mask[1])
  assert batch.mask[1].sum() > batch.mask[0].sum()


def test_pairs_that_cannot_be_scored_are_told(one, examples):
  pair = {**examples[0], "output_1": "Yes.", "output_2": "No."}
  strange = {**pair, "id": "strange", "video": "/no/such.mp4"}
  long = {**pair, "id": "long", "question": "What " * 100}
  kept, problems = scoring.select_scorable(one, [pair, strange, long])
  assert kept == [pair]
  assert [problem.id for problem in problems] == ["strange", "long"]
  assert "data.prompt_len=64" in problems[1].reason


def test_both_answers_stand_behind_the_prompt_that_they_share(
  one, examples, monkeypatch
):
  encode, space = scoring._encode_scored, 7

  def with_space(run, example, answered):
    """The second answer's first word is read apart from the space before it."""
    ids, learn, _ = encode(run, example, answered)
    at = learn.index(True)
    if answered == "No.":
      ids, learn = [*ids[:at], space, *ids[at:]], [*learn[:at], False, *learn[at:]]
    positions = np.arange(len(ids))[:, None]
    return tokenization.EncodedConversation(ids, learn, positions)

  monkeypatch.setattr(scoring, "_encode_scored", with_space)
  long = "Yes. " * 99
  pair = {**examples[0], "output_1": long, "output_2": "No.", "preference": 2}
  groups = scoring.make_pairs_batch(one, [pair], [0])
  no, yes = (with_space(one, pair, said) for said in ("No.", long))
  start = yes.learn.index(True)
  assert groups.prompts.tokens[0, -start:].tolist() == yes.ids[:start]
  assert groups.prompts.mask.sum() == start
  found = [(groups.tokens[0, i], groups.loss_mask[0, i]) for i in range(2)]
  for (tokens, learned), row in zip(found, (no, yes), strict=True):
    count = len(row.ids) - start
    assert tokens[:count].tolist() == row.ids[start:]
    assert learned[:count].tolist() == row.learn[start:] and not learned[count:].any()
  assert found[0][0][0] == space and groups.mask[0, 1].all()
