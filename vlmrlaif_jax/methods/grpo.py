"""GRPO and its variants: advantages within a group of responses, without a critic.

Each choice of a setting is a function with its paper, in a table of this module. The
defaults are those of GRPO (2402.03300). `advantage` selects Dr. GRPO (2503.20783), RLOO
(2402.14740), REINFORCE++ (2501.03262) or Oracle-RLAIF's GRPO_rank (2510.02561).
`surrogate` selects the policy loss of DAPO (2503.14476), dual-clip PPO (1912.09729),
CISPO (2506.13585) or GSPO (2507.18071).
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import check_at_least, check_choices
from vlmrlaif_jax.core.types import (
  AnyArray,
  Batch,
  Groups,
  Loss,
  Method,
  MethodModels,
  Stops,
  merge_params,
)
from vlmrlaif_jax.losses import aggregation, policy, ranking, truncation
from vlmrlaif_jax.losses.advantages import estimate_kl, estimate_reverse_kl
from vlmrlaif_jax.losses.logprobs import sum_logps
from vlmrlaif_jax.losses.masked import masked_mean, row_mean
from vlmrlaif_jax.methods._groups import ScoredGroups, group_scores, select_groups
from vlmrlaif_jax.methods._rollout import compute_rollout_metrics, make_collector
from vlmrlaif_jax.sampling.generate import SampledResponses, compute_group_logps


class GroupRollout(NamedTuple):
  """Groups of sampled responses with their advantages.

  Microbatches split the prompts, never a group.
  """

  groups: Groups  # Responses; loss_mask excludes those without a score.
  old_logps: Float[Array, "prompts group time"]  # Log-probs under the sampling policy.
  ref_logps: Float[Array, "prompts group time"]  # Log-probs under the KL anchor.
  advantages: Float[Array, "prompts group"]  # Advantage of all tokens of a response.
  # Factor of each token's policy loss. It is 0 for responses that are not compared, and
  # scales the mean over all tokens of loss_mask to a mean over those compared.
  policy_weights: Float[Array, "prompts group time"]


def _ignore_policy(compute_advantages):
  return lambda scores, valid, policy_logps: compute_advantages(scores, valid)


# Functions of (scores, valid, policy_logps), as in ranking.py.
ADVANTAGES: dict[str, Callable[..., Array]] = {
  "oracle_ndcg": _ignore_policy(ranking.ndcg_advantages),
  "oracle_ndcg_std": _ignore_policy(ranking.ndcg_std_advantages),
  "oracle_logdisc": _ignore_policy(ranking.logdisc_advantages),
  "gopo_linear": _ignore_policy(ranking.linear_advantages),
  "rank_zscore": _ignore_policy(ranking.rank_zscore_advantages),
  "grpo_scalar": _ignore_policy(ranking.zscore_advantages),
  "dr_grpo": _ignore_policy(ranking.centered_advantages),
  "rloo": _ignore_policy(ranking.leave_one_out_advantages),
  # Over the scores of the whole batch.
  "reinforce_pp": _ignore_policy(ranking.reinforce_advantages),
  "reinforce_pp_baseline": _ignore_policy(ranking.reinforce_baseline_advantages),
  "lambda_ndcg": ranking.lambda_advantages,
  # As reported; they favor bad responses, see their docstrings.
  "paper_ratio": ranking.ratio_advantages,
  "paper_ratio_bounded": ranking.bounded_ratio_advantages,
  "paper_appendix": ranking.appendix_advantages,
}
# Advantages by which groups of equal scores differ from each other.
BETWEEN_GROUPS = ("reinforce_pp",)


class Surrogate(NamedTuple):
  """A policy loss, and the probability ratio that it clips."""

  # (config, logps, old_logps, advantages, mask) -> loss of each token.
  loss: Callable[..., Array]
  # (logps, old_logps, mask) -> ratio of each token, for the metric clip_fraction.
  ratio: Callable[..., Array] = lambda logps, old_logps, mask: policy.token_ratio(
    logps, old_logps
  )


def _get_clip_range(config: ConfigDict) -> dict[str, float]:
  return {key: config[key] for key in ("clip_eps_low", "clip_eps_high")}


SURROGATES = {
  # PPO (1707.06347), and with clip_eps_high above clip_eps_low DAPO (2503.14476).
  "ppo_clip": Surrogate(
    lambda config, logps, old_logps, advantages, mask: policy.clip_higher_policy_loss(
      logps, old_logps, advantages, **_get_clip_range(config)
    )
  ),
  "dual_clip": Surrogate(
    lambda config, logps, old_logps, advantages, mask: policy.dual_clip_policy_loss(
      logps,
      old_logps,
      advantages,
      max_ratio=config.dual_clip,
      **_get_clip_range(config),
    )
  ),
  "cispo": Surrogate(
    lambda config, logps, old_logps, advantages, mask: policy.cispo_policy_loss(
      logps, old_logps, advantages, **_get_clip_range(config)
    )
  ),
  "gspo": Surrogate(
    lambda config, logps, old_logps, advantages, mask: policy.sequence_policy_loss(
      logps, old_logps, advantages, mask, **_get_clip_range(config)
    ),
    policy.sequence_ratio,
  ),
}

# Functions for the loss and for its metrics; see aggregation.py.
LOSS_WEIGHTS = {
  "response": (aggregation.response_weights, aggregation.response_weights),
  "token": (aggregation.token_weights, aggregation.token_weights),
  "constant": (aggregation.constant_weights, aggregation.response_weights),
}

# Functions of (logps, ref_logps).
KL_DIRECTIONS: dict[str, Callable[..., Array]] = {
  # KL(policy || anchor) by k3: GRPO (2402.03300), eq. 4.
  "new_to_ref": lambda logps, ref_logps: estimate_kl(logps, ref_logps, estimator="k3"),
  # KL(anchor || policy): Oracle-RLAIF (2510.02561).
  "old_to_new": estimate_reverse_kl,
}

# Treatments of responses that reach the maximum length: functions of
# (config, scores, valid, stopped, fill) that return new scores and valid, by group.
# `fill` is the length of a response divided by the maximum length.
TRUNCATED_RESPONSES: dict[str, Callable[..., tuple[Array, Array]]] = {
  "rank_last": lambda config, scores, valid, stopped, fill: (
    truncation.rank_truncated_last(scores, valid, stopped),
    valid,
  ),
  "mask": lambda config, scores, valid, stopped, fill: (scores, valid & stopped),
  "keep": lambda config, scores, valid, stopped, fill: (scores, valid),
  "soft_punish": lambda config, scores, valid, stopped, fill: (
    scores
    + config.overlong_penalty
    * truncation.soft_overlong_punishment(fill, share=config.overlong_share),
    valid,
  ),
}
POLICY_LOGPS_REDUCTIONS = {"mean": row_mean, "sum": sum_logps}
OLD_LOGPS = ("sampled", "computed")
GRPO_CHOICES: dict[str, Collection[str]] = {
  "advantage": ADVANTAGES,
  "surrogate": SURROGATES,
  "loss_aggregation": LOSS_WEIGHTS,
  "kl_direction": KL_DIRECTIONS,
  "truncated_responses": TRUNCATED_RESPONSES,
  "old_logps": OLD_LOGPS,
  "policy_logps_reduction": POLICY_LOGPS_REDUCTIONS,
}


def default_config() -> ConfigDict:
  """Returns the settings of GRPO."""
  return ConfigDict(
    dict(
      samples=placeholder(int),  # Responses per prompt.
      slots=0,  # Responses that are decoded concurrently; 0 for all.
      advantage=placeholder(str),  # A key of ADVANTAGES.
      surrogate="ppo_clip",  # A key of SURROGATES: the policy loss.
      clip_eps_low=0.2,  # Maximum decrease of the probability ratio from 1.
      clip_eps_high=0.2,  # Maximum increase of the ratio from 1; 0.28 in DAPO.
      dual_clip=3.0,  # Maximum ratio of "dual_clip" where an advantage is negative.
      tis_max=0.0,  # Maximum of truncated importance weights; 0 disables them.
      loss_aggregation="response",  # A key of LOSS_WEIGHTS.
      kl_coef=placeholder(float),  # Weight of the KL per nat and token.
      # "new_to_ref" is KL(policy || anchor), "old_to_new" Oracle-RLAIF's reverse.
      kl_direction="new_to_ref",
      kl_anchor="sft",  # "sft", or "epoch_start": the stage replaces frozen["ref"].
      entropy_coef=0.0,  # Weight of the entropy bonus per nat and token.
      # Of responses without EOS: "rank_last", "mask" or "keep". "soft_punish" is DAPO's
      # punishment of length.
      truncated_responses="rank_last",
      overlong_share=0.2,  # Share of the maximum length that "soft_punish" punishes.
      overlong_penalty=1.0,  # Score that "soft_punish" subtracts at the maximum length.
      # Exclude groups whose scores are all equal from the mean of the policy loss. They
      # stay in the means of KL and entropy.
      drop_uniform_groups=True,
      # Sampled prompts per prompt of the batch, for which the groups are kept whose
      # scores differ most.
      oversample=1,
      old_logps="sampled",  # "sampled", or "computed" by an additional forward pass.
      policy_logps_reduction="mean",  # "mean" or "sum" over the tokens of a response.
      temperature=1.0,  # Sampling temperature, above 0.
      top_p=1.0,  # Nucleus probability mass; 1 disables it.
      top_k=0,  # Number of candidate tokens; 0 disables it.
      shared_prefix=True,  # Run the prompt of a group once; the loss is the same.
      chunk=128,  # Time steps whose logits are computed together.
    )
  )


def make(
  config: ConfigDict, parts: MethodModels, *, max_new: int, stops: Stops, **limits: int
) -> Method:
  """Returns GRPO, which trains the role "policy".

  It reads "policy", "ref" and the roles of parts.score from frozen. parts.score may be
  a function of the host. `generate` describes max_new, stops, pad and vocab.
  """
  check(config)
  model = parts.policy
  logps_kwargs: dict[str, Any] = {key: config[key] for key in ("chunk", "temperature")}
  logps_kwargs["shared"] = config.shared_prefix
  compute_logps = lambda variables, groups: compute_group_logps(
    model, variables, groups, **logps_kwargs
  )

  @jax.jit
  def prepare_rollout(params, frozen, sampled: SampledResponses, scores, valid):
    treat = functools.partial(TRUNCATED_RESPONSES[config.truncated_responses], config)
    scored = group_scores(
      sampled,
      scores,
      valid,
      samples=config.samples,
      max_new=max_new,
      stops=stops,
      treat_truncated=treat,
    )
    info: dict[str, AnyArray] = {}
    if config.oversample > 1:
      scored, info = select_groups(scored, len(scored.scores) // config.oversample)
    groups, old_logps = scored.groups, scored.sampler_logps
    sampler_weights = jnp.ones_like(old_logps)
    if config.old_logps == "computed":
      variables = merge_params(frozen["policy"], params["policy"])
      old_logps, _ = compute_logps(variables, groups)
      gap = jnp.abs(scored.sampler_logps - old_logps)
      info["sampler_gap"] = masked_mean(gap, groups.loss_mask)
    if config.tis_max:
      sampler_weights = policy.truncated_importance_weights(
        old_logps, scored.sampler_logps, max_weight=config.tis_max
      )
      info["tis_weight"] = masked_mean(sampler_weights, groups.loss_mask)
    ref_logps, _ = compute_logps(frozen["ref"], groups)
    rollout, advantage_info = _compare_groups(
      config, scored, old_logps, ref_logps, sampler_weights, max_new
    )
    return rollout, info | advantage_info

  def loss(params, frozen, rollout: GroupRollout) -> Loss:
    variables = merge_params(frozen["policy"], params["policy"])
    logps, entropy = compute_logps(variables, rollout.groups)
    return compute_grpo_loss(config, rollout, logps, entropy, max_new)

  sampling = {"max_new": max_new, "stops": stops, **limits}
  collect = make_collector(config, parts, prepare_rollout, **sampling)
  return Method(Batch, collect, loss)


def compute_grpo_loss(
  config: ConfigDict,
  rollout: GroupRollout,
  logps: Float[Array, "prompts group time"],
  entropy: Float[Array, "prompts group time"],
  max_new: int,
) -> Loss:
  """Computes policy loss + kl_coef * KL - entropy_coef * entropy.

  With the default settings, it is GRPO (2402.03300), eq. 3, negated; the equation has
  no entropy bonus. `logps` and `entropy` are those of the trained policy, in nats.
  """
  mask = jnp.asarray(rollout.groups.loss_mask)
  loss_weights, metric_weights = LOSS_WEIGHTS[config.loss_aggregation]
  advantages = jnp.broadcast_to(rollout.advantages[..., None], logps.shape)
  surrogate = SURROGATES[config.surrogate]
  policy_loss = rollout.policy_weights * surrogate.loss(
    config, logps, rollout.old_logps, advantages, mask
  )
  kl = KL_DIRECTIONS[config.kl_direction](logps, rollout.ref_logps)
  each = policy_loss + config.kl_coef * kl - config.entropy_coef * entropy
  counts, total = loss_weights(mask, max_new)
  mean = jnp.sum(each * counts, where=mask) / jnp.maximum(total, 1)
  counts, _ = metric_weights(mask, max_new)
  average = lambda x: jnp.sum(x * counts, where=mask) / jnp.maximum(total, 1)
  log_ratio = logps - rollout.old_logps
  change = surrogate.ratio(logps, rollout.old_logps, mask) - 1
  is_clipped = (change < -config.clip_eps_low) | (change > config.clip_eps_high)
  metrics = {
    "policy_loss": average(policy_loss),
    "anchor_kl": average(kl),
    "policy_entropy": average(entropy),
    "clip_fraction": average(is_clipped),
    "approx_kl": average(0.5 * jnp.square(log_ratio)),
  }
  if config.old_logps == "sampled":
    # The loop logs it only for the first update; see loop.FIRST_UPDATE_METRICS.
    metrics["sampler_gap"] = average(jnp.abs(log_ratio))
  return Loss(mean, total, metrics)


def check(config: ConfigDict) -> None:
  """Checks the settings of the method.

  Raises:
    ValueError: a value is invalid. The message starts with the setting's name.
  """
  check_choices(config, GRPO_CHOICES)
  if config.temperature <= 0:
    raise ValueError(
      f"temperature must be above 0 so that responses differ, not {config.temperature}"
    )
  if config.samples < 2:
    raise ValueError(
      f"samples must be 2 or more to compare responses, not {config.samples}"
    )
  check_at_least(
    config,
    dict(clip_eps_low=0, clip_eps_high=0, tis_max=0, overlong_penalty=0, oversample=1),
  )
  if config.dual_clip <= 1:
    raise ValueError(f"dual_clip is a ratio above 1, not {config.dual_clip}")
  if not 0 < config.overlong_share <= 1:
    raise ValueError(
      f"overlong_share must be above 0 and at most 1, not {config.overlong_share}"
    )
  if config.tis_max and config.old_logps != "computed":
    raise ValueError(
      f"tis_max={config.tis_max} weighs computed log-probabilities against the "
      f"sampler's, but old_logps is {config.old_logps!r}: set old_logps=computed, or "
      "tis_max=0"
    )
  if config.advantage in BETWEEN_GROUPS and config.drop_uniform_groups:
    raise ValueError(
      f"drop_uniform_groups=True excludes groups of equal scores, from which advantage="
      f"{config.advantage} learns: set drop_uniform_groups=False"
    )


def _compare_groups(
  config: ConfigDict,
  scored: ScoredGroups,
  old_logps: Float[Array, "prompts group time"],
  ref_logps: Float[Array, "prompts group time"],
  sampler_weights: Float[Array, "prompts group time"],
  max_new: int,
) -> tuple[GroupRollout, dict[str, AnyArray]]:
  """Computes the advantages of groups; returns the rollout and its metrics."""
  groups, compared = scored.groups, scored.compared
  reduce_fn = POLICY_LOGPS_REDUCTIONS[config.policy_logps_reduction]
  policy_logps = reduce_fn(old_logps, groups.loss_mask)
  advantages = ADVANTAGES[config.advantage](
    scored.compared_scores, compared, policy_logps
  )
  tied = ranking.are_tied(scored.compared_scores, compared)
  if config.drop_uniform_groups:
    compared &= ~tied[:, None]
  # any() is avoided: libtpu fuses it with its operand and aborts for some sizes.
  is_compared = compared & (jnp.sum(groups.loss_mask, axis=2) > 0)
  # Equal responses are tied whatever their scores, also without scores.
  differences = jnp.sum(groups.tokens != groups.tokens[:, :1], axis=(1, 2))
  in_loss = scored.valid | (differences == 0)[:, None]
  trained = groups._replace(loss_mask=groups.loss_mask & in_loss[..., None])
  count_items = lambda mask: LOSS_WEIGHTS[config.loss_aggregation][0](mask, max_new)[1]
  compared_mask = groups.loss_mask & compared[..., None]
  scale = count_items(trained.loss_mask) / jnp.maximum(count_items(compared_mask), 1)
  weights = jnp.where(compared_mask, scale * sampler_weights, 0.0)
  info = compute_rollout_metrics(
    groups.tokens,
    groups.loss_mask,
    estimate_kl(old_logps, ref_logps, estimator="k1"),
    scores=scored.scores,
    valid=scored.valid,
    stopped=scored.stopped,
    advantages=jnp.where(is_compared, advantages, 0.0),
  )
  info |= {"learned": jnp.mean(is_compared), "tied": jnp.mean(tied)}
  return GroupRollout(trained, old_logps, ref_logps, advantages, weights), info
