"""Golden values, and what holds of every advantage by order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmrlaif_jax.losses import ranking

BY_ORDER = {
  "oracle_ndcg": ranking.ndcg_advantages,
  "oracle_ndcg_std": ranking.ndcg_std_advantages,
  "oracle_logdisc": ranking.logdisc_advantages,
  "gopo_linear": ranking.linear_advantages,
  "rank_zscore": ranking.rank_zscore_advantages,
}
BY_SCORE = {
  "grpo_scalar": ranking.zscore_advantages,
  "dr_grpo": ranking.centered_advantages,
  "rloo": ranking.leave_one_out_advantages,
}
BY_BATCH = {
  "reinforce_pp": ranking.reinforce_advantages,
  "reinforce_pp_baseline": ranking.reinforce_baseline_advantages,
}
LITERAL = {
  "paper_ratio": ranking.ratio_advantages,
  "paper_ratio_bounded": ranking.bounded_ratio_advantages,
  "paper_appendix": ranking.appendix_advantages,
}
WITH_POLICY = {**LITERAL, "lambda_ndcg": ranking.lambda_advantages}
ALL = {**BY_ORDER, **BY_SCORE, **WITH_POLICY}
named = lambda *tables: pytest.mark.parametrize("name", [n for t in tables for n in t])


def advantages(name, scores, policy=None, valid=None):
  """Of one or more groups; the policy's order is the reverse unless given."""
  scores = jnp.asarray(scores, jnp.float32)
  valid = jnp.ones(scores.shape, bool) if valid is None else jnp.asarray(valid)
  policy = -scores if policy is None else jnp.asarray(policy, jnp.float32)
  more = (policy,) if name in WITH_POLICY else ()
  return np.asarray(ALL[name](scores, valid, *more))


def best_first(size):
  return -np.arange(size, dtype=np.float32)


def test_ranks_count_what_is_higher():
  scores = jnp.asarray([3.0, 5.0, 5.0, -1.0, 9.0])
  valid = jnp.asarray([True, True, True, True, False])
  ranks = ranking.compute_competition_ranks(scores, valid)
  np.testing.assert_array_equal(ranks[:4], [2, 0, 0, 3])


@pytest.mark.parametrize(
  ("name", "want"),
  [
    ("oracle_ndcg", [0.3423, -0.3423]),
    ("oracle_ndcg", [0.6025, -0.0820, -0.2308, -0.2898]),
    ("oracle_ndcg", [0.6666, -0.0180, -0.1668, -0.2258, -0.2561]),
    (
      "oracle_ndcg",
      [0.7733, 0.0888, -0.0600, -0.1190, -0.1493, -0.1673, -0.1791, -0.1873],
    ),
    ("oracle_logdisc", [0.4103, 0.0412, -0.0897, -0.1590, -0.2028]),
    ("gopo_linear", [2, 1, 0, -1, -2]),
    ("rank_zscore", [1.2649, 0.6325, 0, -0.6325, -1.2649]),
  ],
)
def test_golden_values_from_best_to_worst(name, want):
  got = advantages(name, best_first(len(want)))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_tie_shares_the_gains_of_its_places():
  got = advantages("oracle_ndcg", [9.0, 9.0, 5.0, 4.0, 3.0])
  np.testing.assert_allclose(
    got, [0.3243, 0.3243, -0.1668, -0.2258, -0.2561], atol=1e-4
  )


def test_advantages_go_to_the_response_and_not_to_its_place():
  order = [3, 0, 4, 1, 2]
  straight = advantages("oracle_ndcg", best_first(5))
  np.testing.assert_array_equal(
    advantages("oracle_ndcg", best_first(5)[order]), straight[order]
  )


def test_ratio_is_that_of_the_reported_discounts():
  # DCG(policy's rank) / DCG(oracle's rank), a row for each oracle's rank.
  matrix = np.array(
    [
      [1, 0.3155, 0.1667, 0.1077, 0.0774],
      [3.1699, 1, 0.5283, 0.3413, 0.2453],
      [6, 1.8928, 1, 0.6460, 0.4642],
      [9.2877, 2.9299, 1.5480, 1, 0.7186],
      [12.9248, 4.0773, 2.1541, 1.3916, 1],
    ]
  )
  policy_ranks = np.array([4, 2, 0, 1, 3])
  penalty = 1 - matrix[np.arange(5), policy_ranks]
  got = advantages("paper_ratio", best_first(5), policy=-policy_ranks)
  np.testing.assert_allclose(got, penalty.mean() - penalty, atol=1e-3)
  bounded = np.clip(penalty, 0, 1)
  got = advantages("paper_ratio_bounded", best_first(5), policy=-policy_ranks)
  np.testing.assert_allclose(got, bounded.mean() - bounded, atol=1e-3)


def test_appendix_form_has_the_quoted_penalties():
  # Of the response that is best to the oracle, by the policy's rank of it.
  for rank, quoted in [(0, 0.0), (1, 0.2075), (2, 0.3333), (4, 0.4830)]:
    policy_ranks = np.array([rank, *(r for r in range(5) if r != rank)])
    d = lambda r: np.log2(2 + r) / (1 + r)
    penalty = np.clip(1 - d(policy_ranks) / d(np.arange(5)), 0, 1)
    np.testing.assert_allclose(penalty[0], quoted, atol=1e-4)
    got = advantages("paper_appendix", best_first(5), policy=-policy_ranks)
    np.testing.assert_allclose(got, penalty.mean() - penalty, atol=1e-5)


def test_lambda_is_what_a_plain_loop_over_pairs_finds():
  rng = np.random.default_rng(1)
  scores, policy = np.array([4.0, 2.0, 2.0, 7.0, 1.0]), rng.normal(size=5)
  policy_logps_reduction = np.argsort(np.argsort(-policy))
  gain = np.array([1 / 2, (1 / 3 + 1 / 4) / 2, (1 / 3 + 1 / 4) / 2, 1, 1 / 5])
  ideal = sum(g / np.log2(2 + k) for k, g in enumerate(sorted(gain, reverse=True)))
  want = np.zeros(5)
  for i, j in itertools.permutations(range(5), 2):
    if scores[i] > scores[j]:
      d = 1 / np.log2(2 + policy_logps_reduction[[i, j]])
      weight = abs((gain[i] - gain[j]) * (d[0] - d[1])) / ideal
      force = weight / (1 + np.exp(policy[i] - policy[j]))
      want[i] += force
      want[j] -= force
  np.testing.assert_allclose(
    advantages("lambda_ndcg", scores, policy=policy), want, atol=1e-6
  )


def test_zscore_divides_by_the_deviation_of_a_sample():
  scores = np.array([1.0, 4.0, 2.5, 9.0])
  want = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-4)
  np.testing.assert_allclose(advantages("grpo_scalar", scores), want, rtol=1e-5)
  want = scores - scores.mean()
  np.testing.assert_allclose(advantages("dr_grpo", scores), want, rtol=1e-5)


def test_leave_one_out_is_the_score_less_the_mean_of_the_others():
  scores = [1.0, 4.0, 2.5, 9.0]
  by_loop = [s - np.mean(scores[:i] + scores[i + 1 :]) for i, s in enumerate(scores)]
  np.testing.assert_allclose(advantages("rloo", scores), by_loop, rtol=1e-6)
  # verl's form: n / (n - 1) of the score less that of the mean.
  by_verl = [s * 4 / 3 - np.mean(scores) * 4 / 3 for s in scores]
  np.testing.assert_allclose(advantages("rloo", scores), by_verl, rtol=1e-6)
  np.testing.assert_array_equal(  # One response has nothing to be compared with.
    advantages("rloo", scores, valid=[False, True, False, False]), 0
  )


def whiten(x):
  """verl's masked_whiten for responses of one token each: an unbiased variance."""
  x = np.asarray(x, float)
  return (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8)


@named(BY_BATCH)
def test_advantages_over_the_batch_equal_a_loop(name):
  scores, _, valid = some_groups()
  scores, valid = scores[:6], valid[:6] & (np.arange(6) != 2)[:, None]
  flat = []
  for row, kept in zip(scores, valid, strict=True):
    baseline = row[kept].mean() if "baseline" in name and kept.any() else 0.0
    flat += [score - baseline for score in row[kept]]
  got = np.asarray(BY_BATCH[name](jnp.asarray(scores), jnp.asarray(valid)))
  np.testing.assert_allclose(got[valid], whiten(flat), atol=1e-6)
  assert (got[~valid] == 0).all() and abs(got.sum()) < 1e-5
  same = np.full((2, 3), 3.0, np.float32)
  for kept in (np.ones((2, 3), bool), np.zeros((2, 3), bool)):
    np.testing.assert_array_equal(BY_BATCH[name](*map(jnp.asarray, (same, kept))), 0)


@named(BY_BATCH)
def test_no_gradient_flows_through_an_advantage_over_the_batch(name):
  scores, _, valid = map(jnp.asarray, some_groups())
  grad = jax.grad(lambda scores: jnp.sum(BY_BATCH[name](scores, valid) ** 2))(scores)
  np.testing.assert_array_equal(grad, 0)


def test_only_a_baseline_of_the_batch_compares_groups_of_ties():
  scores, valid = jnp.array([[1.0, 1.0], [0.0, 0.0]]), jnp.ones((2, 2), bool)
  np.testing.assert_allclose(  # The std is sqrt(4 x 0.25 / 3).
    ranking.reinforce_advantages(scores, valid),
    [2 * [0.75**0.5], 2 * [-(0.75**0.5)]],
    rtol=1e-6,
  )
  np.testing.assert_array_equal(ranking.reinforce_baseline_advantages(scores, valid), 0)


def test_groups_that_differ_most_are_selected_and_the_first_of_equals():
  scores = jnp.array(
    [
      [0.1, 0.1, 0.1],  # A tie.
      [2.0, 0.0, 1.0],
      [0.0, 1.0, 2.0],  # As far apart as the one before.
      [9.0, 0.0, 0.0],  # One valid score.
      [7.0, 0.0, 9.0],  # No valid score.
      [5.0, 4.5, 4.0],
      [0.0, 3.0, 9.0],  # Two valid scores.
    ]
  )
  valid = jnp.ones((7, 3), bool).at[3, 1:].set(False).at[4].set(False)
  valid = valid.at[6, 2].set(False)
  order = ranking.select_differing_groups
  for count, want in [
    (1, [6]),
    (2, [1, 6]),
    (3, [1, 2, 6]),
    (4, [1, 2, 5, 6]),
    (6, [0, 1, 2, 3, 5, 6]),
  ]:
    np.testing.assert_array_equal(order(scores, valid, count), want)
  np.testing.assert_array_equal(
    ranking.are_tied(scores, valid), [True, False, False, True, True, False, False]
  )


def some_groups():
  """(scores with ties, policy log-probabilities, valid) of many groups of five."""
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, (200, 5)).astype(np.float32)
  return scores, rng.normal(size=(200, 5)), rng.random((200, 5)) < 0.7


@named(ALL)
def test_a_group_sums_to_zero(name):
  got = advantages(name, *some_groups())
  np.testing.assert_allclose(got.sum(axis=1), 0, atol=2e-5)
  assert np.abs(got).max() > 0.1


@named(ALL)
def test_what_is_not_valid_is_as_if_it_were_not_there(name):
  scores, policy, valid = some_groups()
  got = advantages(name, np.where(valid, scores, np.nan), policy, valid)
  assert np.isfinite(got).all() and (got[~valid] == 0).all()
  for row in range(10):
    kept = valid[row]
    alone = advantages(name, scores[row][kept], policy[row][kept])
    np.testing.assert_allclose(got[row][kept], alone, atol=1e-5)


@named(ALL)
@pytest.mark.parametrize("size", [1, 4])
def test_no_group_divides_by_zero(name, size):
  nothing = advantages(name, np.full((2, size), 3.0), valid=np.zeros((2, size), bool))
  np.testing.assert_array_equal(nothing, 0)
  alike = advantages(name, np.full((2, size), 3.0), policy=np.zeros((2, size)))
  np.testing.assert_allclose(alike, 0, atol=1e-6)


@named(BY_ORDER, WITH_POLICY)
def test_an_increasing_map_of_the_scores_changes_nothing(name):
  scores, policy, valid = some_groups()
  plain = advantages(name, scores, policy, valid)
  for mapped in (np.exp(scores), scores**3 - 7, 1e-3 * scores):
    np.testing.assert_array_equal(advantages(name, mapped, policy, valid), plain)


@named(BY_SCORE)
def test_scalar_forms_do_look_at_the_scores(name):
  scores, _, valid = some_groups()
  plain = advantages(name, scores, None, valid)
  assert np.abs(advantages(name, np.exp(scores), None, valid) - plain).max() > 0.1


def expected(name):
  """Mean advantage by oracle's rank, over every order that the policy may have."""
  orders = np.array(list(itertools.permutations(range(5))), np.float32)
  scores = np.tile(best_first(5), (len(orders), 1))
  return advantages(name, scores, policy=-orders).mean(axis=0)


@named(BY_ORDER, BY_SCORE, {"lambda_ndcg": 0})
def test_better_is_worth_more_whatever_the_policy_thinks(name):
  assert (np.diff(expected(name)) < -1e-3).all()


@pytest.mark.parametrize(
  ("name", "want"),
  [
    ("paper_ratio", [-1.83, -1.10, -0.16, 0.94, 2.15]),
    ("paper_ratio_bounded", [-0.41, -0.12, 0.08, 0.20, 0.26]),
    ("paper_appendix", [-0.18, -0.05, 0.04, 0.09, 0.11]),
  ],
)
def test_literal_forms_favour_the_worst_as_their_docstrings_say(name, want):
  np.testing.assert_allclose(expected(name), want, atol=0.01)


@named(ALL)
def test_no_gradient_flows_through_an_advantage(name):
  scores, policy, valid = map(jnp.asarray, some_groups())
  more = (policy,) if name in WITH_POLICY else ()
  total = lambda scores, *more: jnp.sum(ALL[name](scores, valid, *more) ** 2)
  grads = jax.grad(total, argnums=tuple(range(1 + len(more))))(
    scores.astype(jnp.float32), *(x.astype(jnp.float32) for x in more)
  )
  assert all((np.asarray(g) == 0).all() for g in grads)
