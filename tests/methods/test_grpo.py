"""Groups, what is learned from them, and the loss, against NumPy.

Most of it is of a policy that knows the last token alone, and of given responses: it
compiles in no time.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.rows import text_batch
from tests.methods import roles
from vlmrlaif_jax.methods import _rollout, grpo
from vlmrlaif_jax.models.vlm import GroupStates
from vlmrlaif_jax.sampling.generate import SampledResponses

VOCAB, NEW, G, PROMPTS = 7, 6, 4, 6
EOS, PAD, START = 5, 0, 3
ROWS = G * PROMPTS
# One of group 0, all of group 2, one of group 3 have no verdict; group 4 is tied.
VALID = ~np.isin(np.arange(ROWS), [1, 8, 9, 10, 11, 12])
TIED = slice(16, 20)
LEARNED = VALID & ~np.isin(np.arange(ROWS), np.arange(ROWS)[TIED])


class Bigrams:
  """A policy by the last token, as far as methods know one."""

  @staticmethod
  def apply(variables, *groups, method, **settings):
    table = variables["params"]["table"]
    if method == "hidden_groups":
      assert settings == {"shared": True}
      return GroupStates(
        table[groups[0].prompts.tokens[:, -1]], table[groups[0].tokens]
      )
    return jnp.eye(VOCAB)  # Of "head_kernel".


def table(seed):
  return {"params": {"table": jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB))}}


PARAMS, FROZEN = {"policy": table(0)}, {"policy": {}, "ref": table(1)}


@functools.cache
def responses():
  """Of unequal lengths, prompts of one group alike; about half of them end in EOS."""
  rng = np.random.default_rng(0)
  tokens = rng.choice([1, 2, 3, 4, 6], (ROWS, START + NEW))
  tokens[:, :START] = np.repeat(tokens[::G, :START], G, axis=0)
  length = rng.integers(2, NEW + 1, ROWS)
  ends = rng.random(ROWS) < 0.5
  tokens[ends, START + length[ends] - 1] = EOS
  mask = np.arange(START + NEW) < START + length[:, None]
  tokens = np.where(mask, tokens, PAD)
  response = mask & (np.arange(START + NEW) >= START)
  arrays = (jnp.zeros((ROWS, 1, 1, 1)), tokens, mask, response)
  return text_batch(*map(jnp.asarray, arrays))


STOPPED = (np.asarray(responses().tokens) == EOS).any(axis=1)


@functools.cache
def scores():
  made = np.random.default_rng(1).normal(size=ROWS)
  made[TIED] = 3.0
  return np.where(VALID, made, np.nan)


def judge(frozen, batch):
  """Of the host: a plain function, that no tracer ever reaches."""
  assert not isinstance(batch.tokens, jax.core.Tracer)
  return tuple(map(np.asarray, frozen["verdict"]))


@functools.cache
def made(**settings):
  given = {"samples": G, "truncated_responses": "keep", "old_logps": "computed"}
  config = roles.config_of(grpo, **{**given, **settings})
  parts = roles.PARTS._replace(policy=Bigrams, score=judge)
  return grpo.make(config, parts, max_new=NEW, stops=(EOS,), pad=PAD, vocab=VOCAB)


@pytest.fixture(autouse=True)
def _given_responses(monkeypatch):
  given = lambda *_, **settings: SampledResponses(
    responses(), jnp.zeros((ROWS, START + NEW))
  )
  monkeypatch.setattr(_rollout, "generate", given)


def collected(verdict=None, **settings):
  """(rollout, info), in NumPy."""
  frozen = {**FROZEN, "verdict": verdict or (scores(), VALID)}
  out = made(**settings).collect(jax.random.key(0), PARAMS, frozen, responses())
  return jax.tree.map(np.asarray, out)


def loss_and_grads(rollout, params=PARAMS, **settings):
  loss = made(**settings).loss
  rollout = jax.tree.map(jnp.asarray, rollout)

  def total(params):
    found = loss(params, FROZEN, rollout)
    return found.mean, found

  (_, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return found, grads


def groups(x):
  return x.reshape(PROMPTS, G, *x.shape[1:])


def learned(rollout):
  """The responses that there is something to learn from."""
  return rollout.groups.loss_mask.any(axis=2).reshape(-1)


def in_numpy(variables):
  """(log-probability, entropy) of each token."""
  rows = np.asarray(variables["params"]["table"], np.float64)
  logps = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
  entropy = -(np.exp(logps) * logps).sum(axis=1)
  tokens = np.asarray(responses().tokens)
  first = lambda x: np.concatenate([np.zeros((ROWS, 1)), x], axis=1)
  before, after = tokens[:, :-1], tokens[:, 1:]
  return first(logps[before, after]), first(entropy[before])


# What is collected.


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
  np.testing.assert_allclose(rollout.advantages.sum(axis=1), 0, atol=1e-6)
  np.testing.assert_allclose(info["stop_rate"], STOPPED[VALID].mean(), rtol=1e-5)


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
  kl = np.where(VALID[:, None], (old - ref) * mask, 0).sum(axis=1)
  np.testing.assert_allclose(info["row_kl"], kl, rtol=1e-4, atol=1e-5)


# The loss.


def k3(log_ratio):
  return np.exp(log_ratio) - 1 - log_ratio


def mean_over(x, loss_aggregation):
  """Over what is learned."""
  mask = np.asarray(responses().loss_mask)
  rows = [x[r][mask[r]] for r in np.flatnonzero(LEARNED)]
  if loss_aggregation == "token":
    return np.concatenate(rows).mean()
  if loss_aggregation == "response":
    return np.mean([row.mean() for row in rows])
  return np.mean([row.sum() / NEW for row in rows])


@pytest.mark.parametrize(
  ("loss_aggregation", "kl_direction", "sign"),
  [
    ("response", "new_to_ref", -1),
    ("token", "old_to_new", 1),
    ("constant", "new_to_ref", -1),
  ],
)
def test_loss_is_that_of_the_formula(loss_aggregation, kl_direction, sign):
  rollout, _ = collected()
  settings = dict(
    loss_aggregation=loss_aggregation,
    kl_direction=kl_direction,
    kl_coef=0.3,
    entropy_coef=0.2,
  )
  moved = {"policy": jax.tree.map(lambda x, y: x + 0.2 * y, table(0), table(2))}
  (old, _), (new, entropy) = in_numpy(PARAMS["policy"]), in_numpy(moved["policy"])
  ratio = np.exp(new - old)
  a = rollout.advantages.reshape(-1, 1)
  surrogate = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
  kl = k3(sign * (new - in_numpy(FROZEN["ref"])[0]))
  loss, _ = loss_and_grads(rollout, params=moved, **settings)
  want = mean_over(-surrogate + 0.3 * kl - 0.2 * entropy, loss_aggregation)
  np.testing.assert_allclose(loss.mean, want, rtol=1e-4, atol=1e-6)
  shown = "response" if loss_aggregation == "constant" else loss_aggregation
  for name, x in [
    ("anchor_kl", kl),
    ("policy_entropy", entropy),
    ("clip_fraction", np.abs(ratio - 1) > 0.2),
  ]:
    np.testing.assert_allclose(
      loss.metrics[name], mean_over(x, shown), rtol=1e-3, err_msg=name
    )
  assert 0.1 < loss.metrics["clip_fraction"] < 0.9


@pytest.mark.parametrize("kl_direction", grpo.KL_DIRECTIONS)
def test_kl_leads_back_to_its_anchor(kl_direction):
  logps, ref_logps = jnp.asarray([-1.0, -2.0]), jnp.asarray([-1.5, -1.0])
  total = lambda x: jnp.sum(grpo.KL_DIRECTIONS[kl_direction](x, ref_logps))
  assert (jnp.sign(jax.grad(total)(logps)) == jnp.sign(logps - ref_logps)).all()
  assert total(ref_logps) == 0


@pytest.mark.parametrize("loss_aggregation", grpo.LOSS_WEIGHTS)
def test_parts_of_a_rollout_join_by_weight(loss_aggregation):
  rollout, _ = collected()
  parts = [jax.tree.map(lambda x, i=i: x[i::3], rollout) for i in range(3)]
  loss = jax.jit(made(loss_aggregation=loss_aggregation).loss)
  whole, *split = (
    loss(PARAMS, FROZEN, jax.tree.map(jnp.asarray, part)) for part in [rollout, *parts]
  )
  assert len({float(part.weight) for part in split}) > 1
  joined = jax.tree.map(
    lambda *x: sum(a * b.weight for a, b in zip(x, split, strict=True)) / whole.weight,
    *((part.mean, part.metrics) for part in split),
  )
  chex.assert_trees_all_close(joined, (whole.mean, whole.metrics), rtol=1e-4, atol=1e-6)


def test_a_step_makes_the_best_of_each_group_likelier():
  rollout, _ = collected()
  _, grads = loss_and_grads(rollout, kl_coef=0.0)
  moved = jax.tree.map(lambda x, g: x - 0.1 * g, PARAMS, grads)
  mask = np.asarray(responses().loss_mask)
  change = in_numpy(moved["policy"])[0] - in_numpy(PARAMS["policy"])[0]
  change = np.sum(change * mask, axis=1) / mask.sum(axis=1)
  assert np.sum((change * rollout.advantages.reshape(-1))[LEARNED]) > 1e-3


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
  ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    made(**settings)


def test_every_named_advantage_is_a_line_of_config():
  by_policy = {"lambda_ndcg", "paper_ratio", "paper_ratio_bounded", "paper_appendix"}
  by_order = {"oracle_ndcg", "oracle_ndcg_std", "oracle_logdisc", "gopo_linear"}
  by_score = {"grpo_scalar", "dr_grpo", "rank_zscore"}
  assert set(grpo.ADVANTAGES) == by_policy | by_order | by_score
