"""Groups, their advantages and settings, against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods.bigrams import (
  FROZEN,
  LEARNED,
  NEW,
  PARAMS,
  PROMPTS,
  ROWS,
  START,
  STOPPED,
  VALID,
  G,
  collected,
  give_responses,
  groups,
  in_numpy,
  learned,
  loss_and_grads,
  made,
  pulled,
  responses,
  scores,
)
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import ignore_phase
from vlmrlaif_jax.methods import _rollout, grpo
from vlmrlaif_jax.sampling.generate import SampledResponses

# What is collected.


@pytest.fixture(autouse=True)
def _given_responses(monkeypatch):
  give_responses(monkeypatch)


def test_advantages_are_by_rank_among_what_was_judged():
  rollout, _ = collected()
  dcg = 1 / ((1 + np.arange(G)) * np.log2(2 + np.arange(G)))
  for group in (0, 1, 3, 5):
    kept = groups(VALID)[group]
    found = groups(scores())[group][kept]
    gain = dcg[[(found > score).sum() for score in found]]
    got = rollout.advantages[group]
    np.testing.assert_allclose(got[kept], gain - gain.mean(), atol=1e-6)
    assert (got[~kept] == 0).all()


def test_nothing_is_learned_from_the_invalid_nor_from_ties():
  rollout, info = collected()
  np.testing.assert_array_equal(learned(rollout), LEARNED)
  np.testing.assert_array_equal(pulled(rollout), VALID)
  assert (rollout.advantages.reshape(-1)[~LEARNED] == 0).all()
  chex.assert_tree_all_finite(rollout)
  assert info["invalid"] == (~VALID).sum()
  np.testing.assert_allclose(info["tied"], 2 / PROMPTS)  # One of them is all invalid.
  np.testing.assert_allclose(info["learned"], LEARNED.mean())


def test_ties_stay_if_they_are_to():
  rollout, _ = collected(drop_uniform_groups=False, truncated_responses="rank_last")
  np.testing.assert_array_equal(learned(rollout), VALID)


def test_a_score_that_is_no_number_is_invalid():
  _, info = collected((scores(), np.ones(ROWS, bool)))
  np.testing.assert_array_equal(info["valid"], VALID)


def test_a_judge_that_always_fails_moves_nothing():
  rollout, info = collected((np.full(ROWS, np.nan), np.zeros(ROWS, bool)))
  loss, grads = loss_and_grads(rollout)
  assert info["invalid"] == ROWS
  assert loss.weight == 0 and loss.mean == 0 and optax.tree.norm(grads) == 0


def test_truncated_responses_share_the_last_rank():
  rollout, _ = collected(drop_uniform_groups=False, truncated_responses="rank_last")
  checked = 0
  for group in range(PROMPTS):
    kept, ends = groups(VALID)[group], groups(STOPPED)[group]
    got = rollout.advantages[group]
    if (kept & ends).any() and (kept & ~ends).any():
      assert got[kept & ~ends].max() < got[kept & ends].min()
      assert np.ptp(got[kept & ~ends]) < 1e-6
      checked += 1
  assert checked > 2


def test_truncated_responses_are_left_out():
  rollout, info = collected(truncated_responses="mask")
  left = learned(rollout)
  assert not left[~STOPPED].any() and left.any()
  np.testing.assert_array_equal(pulled(rollout), VALID)
  np.testing.assert_allclose(rollout.advantages.sum(axis=1), 0, atol=1e-6)
  np.testing.assert_allclose(info["stop_rate"], STOPPED[VALID].mean(), rtol=1e-5)


def test_long_responses_are_punished_softly():
  settings = dict(overlong_share=0.5, overlong_penalty=2.0, advantage="dr_grpo")
  rollout, info = collected(truncated_responses="soft_punish", **settings)
  length = np.asarray(responses().loss_mask).sum(axis=1)  # Of at most 6 tokens.
  punished = scores() - 2.0 * np.array([0, 0, 0, 0, 1 / 3, 2 / 3, 1])[length]
  for group in range(PROMPTS):
    kept = groups(VALID)[group]
    if kept.any():
      want = groups(punished)[group][kept]
      got = rollout.advantages[group][kept]
      np.testing.assert_allclose(got, want - want.mean(), atol=1e-6)
  np.testing.assert_allclose(info["scores"][VALID], scores()[VALID], rtol=1e-6)
  assert info["tied"] < 2 / PROMPTS  # The tie of group 4 is broken by length.


def test_equal_responses_count_in_kl_without_a_score(monkeypatch):
  equal = jax.tree.map(lambda x: x.at[:G].set(x[0]), responses())
  given = lambda *_, **settings: SampledResponses(equal, jnp.zeros((ROWS, START + NEW)))
  monkeypatch.setattr(_rollout, "generate", given)
  nothing = (np.full(ROWS, np.nan), np.zeros(ROWS, bool))
  rollout, info = collected(nothing, kl_coef=0.05)
  np.testing.assert_array_equal(pulled(rollout), np.arange(ROWS) < G)
  assert not learned(rollout).any() and info["learned"] == 0
  loss, grads = loss_and_grads(rollout, kl_coef=0.05)
  assert loss.weight == G and loss.metrics["policy_loss"] == 0
  assert optax.tree.norm(grads) > 1e-3


# Groups that are selected.


def test_the_groups_that_differ_most_are_kept_with_their_prompts():
  whole, _ = collected(advantage="dr_grpo")
  rollout, info = collected(advantage="dr_grpo", oversample=2)
  spread = [
    np.std(each[kept], ddof=1) if kept.sum() > 1 else -1.0
    for each, kept in zip(groups(scores()), groups(VALID), strict=True)
  ]
  kept = np.sort(np.argsort(spread)[-PROMPTS // 2 :])
  assert 2 not in kept and 4 not in kept  # Without a score; tied.
  rows = np.concatenate([np.arange(g * G, g * G + G) for g in kept])
  np.testing.assert_array_equal(info["sampled_rows"], rows)
  np.testing.assert_allclose(rollout.advantages, whole.advantages[kept], atol=1e-6)
  tokens = np.asarray(responses().tokens)
  np.testing.assert_array_equal(info["tokens"], tokens[rows, START:])
  np.testing.assert_array_equal(rollout.groups.prompts.tokens, tokens[kept * G, :START])
  np.testing.assert_allclose(info["reward"], np.nanmean(scores()[rows]), rtol=1e-5)
  np.testing.assert_allclose(info["reward_sampled"], np.nanmean(scores()), rtol=1e-5)
  np.testing.assert_allclose(info["tied_sampled"], 2 / PROMPTS)
  assert info["tied"] == 0


def test_groups_are_selected_from_several_devices():
  want, info = collected(oversample=2)
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2)
  sampled = SampledResponses(responses(), jnp.zeros((ROWS, START + NEW)))
  put = lambda tree: sharding.replicate(tree, mesh)
  finish = made(oversample=2).collect.finish
  rollout, found = finish(
    put(PARAMS),
    {**put(FROZEN), "verdict": (scores(), VALID)},
    sharding.shard_batch(jax.device_get(sampled), mesh),
    ignore_phase,
  )
  chex.assert_trees_all_close((rollout, found), (want, info), atol=1e-5)


def test_policys_order_is_by_log_probability_per_token():
  logps, mask = in_numpy(PARAMS["policy"])[0], np.asarray(responses().loss_mask)
  likely = np.sum(logps * mask, axis=1) / mask.sum(axis=1)
  rollout, _ = collected(advantage="paper_ratio")
  args = (np.nan_to_num(scores()), VALID, likely)
  want = jax.jit(grpo.ADVANTAGES["paper_ratio"])(*(groups(x) for x in args))
  np.testing.assert_allclose(rollout.advantages, want, atol=1e-4)


def test_what_is_told_is_of_judged_responses():
  _rollout, info = collected()
  mask = np.asarray(responses().loss_mask)
  old, _ = in_numpy(PARAMS["policy"])
  ref, _ = in_numpy(FROZEN["ref"])
  want = {
    "reward": np.nanmean(scores()),
    "kl": np.sum((old - ref) * mask, axis=1)[VALID].mean(),
    "length": mask[VALID].sum(axis=1).mean(),
  }
  for name, value in want.items():
    np.testing.assert_allclose(info[name], value, rtol=1e-4, err_msg=name)
  np.testing.assert_array_equal(info["sampled_rows"], np.arange(ROWS))
  kl = np.where(VALID[:, None], (old - ref) * mask, 0).sum(axis=1)
  np.testing.assert_allclose(info["row_kl"], kl, rtol=1e-4, atol=1e-5)


# Settings.


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"advantage": "ndgc"}, "advantage must be one of oracle_ndcg, .* not 'ndgc'"),
    (
      {"loss_aggregation": "mean"},
      "loss_aggregation must be one of response, token, constant",
    ),
    ({"kl_direction": "both"}, "kl_direction must be one of new_to_ref, old_to_new"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"samples": 1}, "samples must be 2 or more"),
    ({"surrogate": "ppo"}, "surrogate must be one of ppo_clip, .* not 'ppo'"),
    ({"oversample": 0}, "oversample must be 1 or more"),
    ({"dual_clip": 1.0}, "dual_clip is a ratio above 1, not 1.0"),
    ({"overlong_share": 0.0}, "overlong_share must be above 0"),
    ({"tis_max": 2.0, "old_logps": "sampled"}, "tis_max=2.0 .*old_logps=computed"),
    ({"advantage": "reinforce_pp"}, "drop_uniform_groups=True .*=False"),
  ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    made(**settings)


def test_every_named_advantage_is_a_line_of_config():
  by_policy = {"lambda_ndcg", "paper_ratio", "paper_ratio_bounded", "paper_appendix"}
  by_order = {"oracle_ndcg", "oracle_ndcg_std", "oracle_logdisc", "gopo_linear"}
  by_score = {"grpo_scalar", "dr_grpo", "rank_zscore", "rloo"}
  by_batch = {"reinforce_pp", "reinforce_pp_baseline"}
  assert set(grpo.ADVANTAGES) == by_policy | by_order | by_score | by_batch
