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
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import ignore_phase
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
  """The responses that are compared: those of the policy loss."""
  return rollout.policy_weights.any(axis=2).reshape(-1)


def pulled(rollout):
  """The responses that count in KL and entropy."""
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
  np.testing.assert_array_equal(info["prompt_rows"], np.repeat(kept, G))
  np.testing.assert_allclose(rollout.advantages, whole.advantages[kept], atol=1e-6)
  rows = np.concatenate([np.arange(g * G, g * G + G) for g in kept])
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
  np.testing.assert_array_equal(info["prompt_rows"], np.arange(ROWS) // G)
  kl = np.where(VALID[:, None], (old - ref) * mask, 0).sum(axis=1)
  np.testing.assert_allclose(info["row_kl"], kl, rtol=1e-4, atol=1e-5)


# The loss.


def k3(log_ratio):
  return np.exp(log_ratio) - 1 - log_ratio


def mean_over(x, which, loss_aggregation):
  """Over some responses."""
  mask = np.asarray(responses().loss_mask)
  rows = [x[r][mask[r]] for r in np.flatnonzero(which)]
  if loss_aggregation == "token":
    return np.concatenate(rows).mean()
  if loss_aggregation == "response":
    return np.mean([row.mean() for row in rows])
  return np.mean([row.sum() / NEW for row in rows])


LOW, HIGH, DUAL = 0.1, 0.3, 1.4


def policy_losses(surrogate, ratio, a, logps):
  """(losses of tokens, ratios that are clipped), by the papers' formulas."""
  if surrogate == "gspo":
    mask = np.asarray(responses().loss_mask)
    mean = np.sum(np.log(ratio) * mask, axis=1) / mask.sum(axis=1)
    ratio = np.exp(mean)[:, None] + 0 * ratio
  clipped = np.clip(ratio, 1 - LOW, 1 + HIGH)
  if surrogate == "cispo":
    return -clipped * a * logps, ratio
  gain = np.minimum(ratio * a, clipped * a)
  if surrogate == "dual_clip":
    gain = np.where(a < 0, np.maximum(gain, DUAL * a), gain)
  return -gain, ratio


@pytest.mark.parametrize(
  ("surrogate", "loss_aggregation", "kl_direction", "sign"),
  [
    ("ppo_clip", "response", "new_to_ref", -1),
    ("cispo", "token", "old_to_new", 1),
    ("dual_clip", "constant", "new_to_ref", -1),
    ("gspo", "response", "old_to_new", 1),
  ],
)
def test_loss_is_that_of_the_formula(surrogate, loss_aggregation, kl_direction, sign):
  rollout, _ = collected()
  settings = dict(
    surrogate=surrogate,
    clip_eps_low=LOW,
    clip_eps_high=HIGH,
    dual_clip=DUAL,
    loss_aggregation=loss_aggregation,
    kl_direction=kl_direction,
    kl_coef=0.3,
    entropy_coef=0.2,
  )
  if loss_aggregation != "response":
    # The factors are by response; those of another aggregation are collected with it.
    rollout, _ = collected(loss_aggregation=loss_aggregation)
  moved = {"policy": jax.tree.map(lambda x, y: x + 0.2 * y, table(0), table(2))}
  (old, _), (new, entropy) = in_numpy(PARAMS["policy"]), in_numpy(moved["policy"])
  a = rollout.advantages.reshape(-1, 1)
  losses, ratio = policy_losses(surrogate, np.exp(new - old), a, new)
  kl = k3(sign * (new - in_numpy(FROZEN["ref"])[0]))
  loss, _ = loss_and_grads(rollout, params=moved, **settings)
  want = mean_over(losses, LEARNED, loss_aggregation)
  want += mean_over(0.3 * kl - 0.2 * entropy, VALID, loss_aggregation)
  np.testing.assert_allclose(loss.mean, want, rtol=1e-4, atol=1e-6)
  shown = "response" if loss_aggregation == "constant" else loss_aggregation
  is_clipped = (ratio < 1 - LOW) | (ratio > 1 + HIGH)
  for name, x in [
    ("anchor_kl", kl),
    ("policy_entropy", entropy),
    ("clip_fraction", is_clipped),
  ]:
    np.testing.assert_allclose(
      loss.metrics[name], mean_over(x, VALID, shown), rtol=1e-3, err_msg=name
    )
  np.testing.assert_allclose(
    loss.metrics["policy_loss"], mean_over(losses, LEARNED, shown), rtol=1e-3
  )
  assert 0.1 < loss.metrics["clip_fraction"] < 0.9


def test_tokens_weigh_what_the_trainer_computes_against_the_sampler():
  rollout, info = collected(tis_max=0.2, drop_uniform_groups=False)
  mask = np.asarray(responses().loss_mask)
  # The given responses have log-probability 0 by the sampler.
  weights = np.minimum(np.exp(in_numpy(PARAMS["policy"])[0]), 0.2)
  assert (weights[mask] < 0.2).any() and (weights[mask] == 0.2).any()
  got = rollout.policy_weights.reshape(ROWS, NEW)
  want = np.where(VALID[:, None] & mask, weights, 0)[:, START:]
  np.testing.assert_allclose(got, want, rtol=1e-4)
  np.testing.assert_allclose(info["tis_weight"], weights[mask].mean(), rtol=1e-4)


def test_an_advantage_and_a_surrogate_are_entries(monkeypatch):
  signs = lambda scores, valid, policy_logps: jnp.sign(scores) * valid
  plain = lambda config, logps, old_logps, advantages, mask: -advantages * logps
  monkeypatch.setitem(grpo.ADVANTAGES, "signs", signs)
  monkeypatch.setitem(grpo.SURROGATES, "reinforce", grpo.Surrogate(plain))
  settings = dict(advantage="signs", surrogate="reinforce", kl_coef=0.0)
  rollout, _ = collected(**settings)
  want = np.sign(np.nan_to_num(scores()))
  np.testing.assert_array_equal(rollout.advantages.reshape(-1), want)
  loss, grads = loss_and_grads(rollout, **settings)
  moved = jax.tree.map(lambda x, g: x - 0.1 * g, PARAMS, grads)
  logps = in_numpy(PARAMS["policy"])[0]
  losses = -want[:, None] * logps
  np.testing.assert_allclose(
    loss.mean, mean_over(losses, LEARNED, "response"), rtol=1e-4
  )
  better = want[:, None] * (in_numpy(moved["policy"])[0] - logps)
  assert mean_over(better, LEARNED, "response") > 1e-3


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
