"""GRPO and its variants: advantages within a group of responses, without a critic.

`advantage` and `loss_aggregation` select GRPO (2402.03300), Dr. GRPO (2503.20783),
DAPO's mean over tokens (2503.14476) or Oracle-RLAIF's GRPO_rank (2510.02561).
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import check_choices
from vlmrlaif_jax.core.types import (
  Batch,
  Groups,
  Loss,
  Method,
  MethodModels,
  Stops,
  group_rows,
  has_stop,
  merge_params,
)
from vlmrlaif_jax.losses import ranking
from vlmrlaif_jax.losses.advantages import estimate_kl
from vlmrlaif_jax.losses.logprobs import sum_logps
from vlmrlaif_jax.losses.masked import masked_mean, row_mean
from vlmrlaif_jax.losses.policy import clipped_policy_loss
from vlmrlaif_jax.methods._rollout import compute_rollout_metrics, make_collector
from vlmrlaif_jax.sampling.generate import SampledResponses, compute_group_logps


class GroupRollout(NamedTuple):
  """Groups of sampled responses with their advantages.

  Microbatches split the prompts, never a group.
  """

  groups: Groups  # Responses; loss_mask excludes those without a training signal.
  old_logps: Float[Array, "prompts group time"]  # Log-probs under the sampling policy.
  ref_logps: Float[Array, "prompts group time"]  # Log-probs under the KL anchor.
  advantages: Float[Array, "prompts group"]  # Advantage of all tokens of a response.


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
  "lambda_ndcg": ranking.lambda_advantages,
  # As reported; they favor bad responses, see their docstrings.
  "paper_ratio": ranking.ratio_advantages,
  "paper_ratio_bounded": ranking.bounded_ratio_advantages,
  "paper_appendix": ranking.appendix_advantages,
}


Weights = tuple[Float[Array, "*batch time"], Float[Array, ""]]


def _sequence_weights(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  length = jnp.sum(mask, axis=-1, keepdims=True)
  return mask / jnp.maximum(length, 1), jnp.sum(length > 0).astype(jnp.float32)


def _token_weights(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  return mask.astype(jnp.float32), jnp.sum(mask).astype(jnp.float32)


def _constant_weights(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  return mask / max_new, jnp.sum(jnp.any(mask, axis=-1)).astype(jnp.float32)


# Functions of (mask, max_new) for the loss and for its metrics. They return the weight
# of each token and the divisor of the weighted sum.
LOSS_WEIGHTS = {
  # GRPO (2402.03300, eq. 3): mean over responses of the mean over their tokens.
  "response": (_sequence_weights, _sequence_weights),
  # DAPO (2503.14476, section 3.3): mean over all tokens.
  "token": (_token_weights, _token_weights),
  # Dr. GRPO (2503.20783, section 3.2): mean over responses of token sums / max_new.
  "constant": (_constant_weights, _sequence_weights),
}


def reverse_kl(
  logps: Float[Array, "*batch time"], ref_logps: Float[Array, "*batch time"]
) -> Float[Array, "*batch time"]:
  """Estimates KL(anchor || policy) in nats: k3 with reversed arguments.

    exp(log r) - 1 - log r,  with r = p / p_anchor

  It is unbiased for tokens of the anchor. The policy that sampled the tokens has been
  updated since the anchor was copied, so there is a small bias.
  """
  log_ratio = jnp.clip(logps - jax.lax.stop_gradient(ref_logps), -20.0, 20.0)
  return jnp.expm1(log_ratio) - log_ratio


# Estimates KL(policy || anchor) by k3: GRPO (2402.03300), eq. 4.
forward_kl = functools.partial(estimate_kl, estimator="k3")
KL_DIRECTIONS: dict[str, Callable[..., Array]] = {
  "new_to_ref": forward_kl,
  "old_to_new": reverse_kl,
}

# Treatments of responses without EOS: functions of (scores, valid, stopped) that return
# new scores and valid, by group.
TRUNCATED_RESPONSES = {
  "rank_last": lambda scores, valid, stopped: (
    _rank_truncated_last(scores, valid, stopped),
    valid,
  ),
  "mask": lambda scores, valid, stopped: (scores, valid & stopped),
  "keep": lambda scores, valid, stopped: (scores, valid),
}
POLICY_LOGPS_REDUCTIONS = {"mean": row_mean, "sum": sum_logps}
OLD_LOGPS = ("sampled", "computed")
GRPO_CHOICES: dict[str, Collection[str]] = {
  "advantage": ADVANTAGES,
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
      loss_aggregation="response",  # A key of LOSS_WEIGHTS.
      clip_eps=0.2,  # Maximum change of a token's probability ratio.
      kl_coef=placeholder(float),  # Weight of the KL per nat and token.
      # "new_to_ref" is KL(policy || anchor), "old_to_new" Oracle-RLAIF's reverse.
      kl_direction="new_to_ref",
      kl_anchor="sft",  # "sft", or "epoch_start": the stage replaces frozen["ref"].
      entropy_coef=0.0,  # Weight of the entropy bonus per nat and token.
      truncated_responses="rank_last",  # "rank_last", "mask" or "keep" if without EOS.
      drop_uniform_groups=True,  # Exclude groups whose scores are all equal.
      old_logps="sampled",  # "sampled", or "computed" by an additional forward pass.
      policy_logps_reduction="mean",  # "mean" or "sum" over the tokens of a response.
      temperature=1.0,  # Sampling temperature, above 0.
      top_p=1.0,  # Nucleus probability mass; 1 disables it.
      top_k=0,  # Number of candidate tokens; 0 disables it.
      shared_prefix=True,  # Run the prompt of a group once; the loss is the same.
      chunk=128,  # Time steps whose logits are computed together.
      async_rollouts=False,  # Sample the next rollout before the update; see job.py.
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
  policy = parts.policy
  logps_kwargs: dict[str, Any] = {key: config[key] for key in ("chunk", "temperature")}
  logps_kwargs["shared"] = config.shared_prefix
  compute_logps = lambda variables, groups: compute_group_logps(
    policy, variables, groups, **logps_kwargs
  )

  @jax.jit
  def prepare_rollout(params, frozen, sampled: SampledResponses, scores, valid):
    batch, start = sampled.batch, sampled.logps.shape[1] - max_new
    groups = group_rows(batch, group=config.samples, start=start)
    to_groups = lambda x: x.reshape(-1, config.samples)
    scores, valid, stopped = map(to_groups, (scores, valid, has_stop(batch, stops)))
    valid &= jnp.isfinite(scores)
    scores = jnp.where(valid, scores, 0.0)
    old_logps = sampled.logps[:, start:].reshape(groups.tokens.shape)
    gap = {}
    if config.old_logps == "computed":
      recorded = old_logps
      variables = merge_params(frozen["policy"], params["policy"])
      old_logps, _ = compute_logps(variables, groups)
      gap["sampler_gap"] = masked_mean(jnp.abs(recorded - old_logps), groups.loss_mask)
    ref_logps, _ = compute_logps(frozen["ref"], groups)
    reduce_fn = POLICY_LOGPS_REDUCTIONS[config.policy_logps_reduction]
    policy_logps = reduce_fn(old_logps, groups.loss_mask)
    advantages, used, tied = _compute_group_advantages(
      config, scores, valid, stopped, policy_logps
    )
    trained = groups._replace(loss_mask=groups.loss_mask & used[..., None])
    # any() is avoided: libtpu fuses it with its operand and aborts for some sizes.
    is_trained = jnp.sum(trained.loss_mask, axis=2) > 0
    info = compute_rollout_metrics(
      groups.tokens,
      groups.loss_mask,
      estimate_kl(old_logps, ref_logps, estimator="k1"),
      scores=scores,
      valid=valid,
      stopped=stopped,
      advantages=jnp.where(is_trained, advantages, 0.0),
    )
    info |= gap | {"learned": jnp.mean(is_trained), "tied": jnp.mean(tied)}
    return GroupRollout(trained, old_logps, ref_logps, advantages), info

  def loss(params, frozen, rollout: GroupRollout) -> Loss:
    variables = merge_params(frozen["policy"], params["policy"])
    logps, entropy = compute_logps(variables, rollout.groups)
    return compute_grpo_loss(config, rollout, logps, entropy, max_new)

  sampling = {"max_new": max_new, "stops": stops, **limits}
  collect = make_collector(
    config, policy, parts.score, prepare_rollout, parts.sampler, **sampling
  )
  return Method(Batch, collect, loss)


def compute_grpo_loss(
  config: ConfigDict,
  rollout: GroupRollout,
  logps: Float[Array, "prompts group time"],
  entropy: Float[Array, "prompts group time"],
  max_new: int,
) -> Loss:
  """Computes clipped policy loss + kl_coef * KL - entropy_coef * entropy.

  It is GRPO (2402.03300), eq. 3, negated; the equation has no entropy bonus. `logps`
  and `entropy` are those of the trained policy, in nats.
  """
  mask = jnp.asarray(rollout.groups.loss_mask)
  loss_weights, metric_weights = LOSS_WEIGHTS[config.loss_aggregation]
  advantages = jnp.broadcast_to(rollout.advantages[..., None], logps.shape)
  surrogate = clipped_policy_loss(
    logps, rollout.old_logps, advantages, clip_eps=config.clip_eps
  )
  kl = KL_DIRECTIONS[config.kl_direction](logps, rollout.ref_logps)
  each = surrogate + config.kl_coef * kl - config.entropy_coef * entropy
  counts, total = loss_weights(mask, max_new)
  mean = jnp.sum(each * counts, where=mask) / jnp.maximum(total, 1)
  counts, _ = metric_weights(mask, max_new)
  average = lambda x: jnp.sum(x * counts, where=mask) / jnp.maximum(total, 1)
  log_ratio = logps - rollout.old_logps
  metrics = {
    "policy_loss": average(surrogate),
    "anchor_kl": average(kl),
    "policy_entropy": average(entropy),
    "clip_fraction": average(jnp.abs(jnp.expm1(log_ratio)) > config.clip_eps),
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


def _compute_group_advantages(
  config: ConfigDict,
  scores: Float[Array, "prompts group"],
  valid: Bool[Array, "prompts group"],
  stopped: Bool[Array, "prompts group"],
  policy_logps: Float[Array, "prompts group"],
) -> tuple[
  Float[Array, "prompts group"], Bool[Array, "prompts group"], Bool[Array, " prompts"]
]:
  """Returns advantages, whether each response is used, and whether groups are tied."""
  scores, used = TRUNCATED_RESPONSES[config.truncated_responses](scores, valid, stopped)
  advantages = ADVANTAGES[config.advantage](scores, used, policy_logps)
  highest = jnp.max(scores, axis=1, where=used, initial=-jnp.inf)
  lowest = jnp.min(scores, axis=1, where=used, initial=jnp.inf)
  tied = highest <= lowest  # For an empty group, -inf <= inf.
  if config.drop_uniform_groups:
    used &= ~tied[:, None]
  return advantages, used, tied


def _rank_truncated_last(
  scores: Float[Array, "prompts group"],
  valid: Bool[Array, "prompts group"],
  stopped: Bool[Array, "prompts group"],
) -> Float[Array, "prompts group"]:
  """Sets scores of responses without EOS to 1 below the lowest score of the group."""
  lowest = jnp.min(scores, axis=1, keepdims=True, where=valid, initial=jnp.inf)
  return jnp.where(stopped | ~valid, scores, lowest - 1)
