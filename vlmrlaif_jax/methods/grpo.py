"""A group of responses to each prompt, compared with each other: no critic.

GRPO (2402.03300), Dr. GRPO (2503.20783), DAPO's mean over tokens (2503.14476) and
Oracle-RLAIF's GRPO_rank (2510.02561) differ in `advantage` and `loss_aggregation`.
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
  Params,
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
  """Sampled responses, and their advantages. It is divided by prompts alone."""

  groups: Groups  # loss_mask: of the responses that there is something to learn from.
  old_logps: Float[Array, "prompts group time"]  # Under the policy that sampled.
  ref_logps: Float[Array, "prompts group time"]  # Under the anchor of the KL.
  advantages: Float[Array, "prompts group"]  # Of a whole response; each token has it.


def _no_policy(by_scores):
  return lambda scores, valid, policy_logps: by_scores(scores, valid)


# (scores, valid, policy's log-probabilities) -> advantages, all by group.
ADVANTAGES: dict[str, Callable[..., Array]] = {
  "oracle_ndcg": _no_policy(ranking.ndcg_advantages),
  "oracle_ndcg_std": _no_policy(ranking.ndcg_std_advantages),
  "oracle_logdisc": _no_policy(ranking.logdisc_advantages),
  "gopo_linear": _no_policy(ranking.linear_advantages),
  "rank_zscore": _no_policy(ranking.rank_zscore_advantages),
  "grpo_scalar": _no_policy(ranking.zscore_advantages),
  "dr_grpo": _no_policy(ranking.centered_advantages),
  "lambda_ndcg": ranking.lambda_advantages,
  # As reported; they favour bad responses, see their docstrings.
  "paper_ratio": ranking.ratio_advantages,
  "paper_ratio_bounded": ranking.bounded_ratio_advantages,
  "paper_appendix": ranking.appendix_advantages,
}


Weights = tuple[Float[Array, "*batch time"], Float[Array, ""]]


def _by_response(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  length = jnp.sum(mask, axis=-1, keepdims=True)
  return mask / jnp.maximum(length, 1), jnp.sum(length > 0).astype(jnp.float32)


def _by_token(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  return mask.astype(jnp.float32), jnp.sum(mask).astype(jnp.float32)


def _by_longest(mask: Bool[Array, "*batch time"], max_new: int) -> Weights:
  return mask / max_new, jnp.sum(jnp.any(mask, axis=-1)).astype(jnp.float32)


# Each for the loss and for its metrics, from (mask, longest response) to what a token
# counts and what their sum is divided by.
LOSS_WEIGHTS = {
  # GRPO: the mean over responses of the mean over their tokens.
  "response": (_by_response, _by_response),
  # DAPO: the mean over all tokens, so that a long response counts for more.
  "token": (_by_token, _by_token),
  # Dr. GRPO: the mean over responses of the sum over their tokens, by max_new.
  "constant": (_by_longest, _by_response),
}


def reverse_kl(
  logps: Float[Array, "*batch time"], ref_logps: Float[Array, "*batch time"]
) -> Float[Array, "*batch time"]:
  """Estimate of KL(anchor || policy), k3 with its arguments reversed.

    exp(log r) - 1 - log r,  with r = p / p_anchor

  From tokens of the anchor it is unbiased; those that were sampled since it was taken
  are of a policy a little further on.
  """
  log_ratio = jnp.clip(logps - jax.lax.stop_gradient(ref_logps), -20.0, 20.0)
  return jnp.expm1(log_ratio) - log_ratio


# Estimate of KL(policy || anchor), as in GRPO: k3.
forward_kl = functools.partial(estimate_kl, estimator="k3")
KL_DIRECTIONS: dict[str, Callable[..., Array]] = {
  "new_to_ref": forward_kl,
  "old_to_new": reverse_kl,
}

# (scores, valid, stopped) -> scores, valid, by group: what becomes of a response that
# was cut at its longest.
TRUNCATED_RESPONSES = {
  "rank_last": lambda scores, valid, stopped: (
    _put_last(scores, valid, stopped),
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
  return ConfigDict(
    dict(
      samples=placeholder(int),  # Responses to each prompt.
      slots=0,  # Responses in the making at once, see generate; 0: all.
      advantage=placeholder(str),  # A key of ADVANTAGES.
      loss_aggregation="response",  # A key of AGGREGATES.
      clip_eps=0.2,
      kl_coef=placeholder(float),  # Of the KL in the loss, per nat and token.
      kl_direction="new_to_ref",  # Or Oracle-RLAIF's "old_to_new", from the anchor on.
      kl_anchor="sft",  # Or "epoch_start": the stage renews frozen["ref"].
      entropy_coef=0.0,  # Of the entropy, per nat and token, as a bonus.
      truncated_responses="rank_last",  # A response without an end: "rank_last", "mask" or "keep".
      drop_uniform_groups=True,  # Leave out groups whose scores are all the same.
      old_logps="sampled",  # As recorded; or "computed" anew, by one more pass.
      policy_logps_reduction="mean",  # A response's log-probability, per token or their "sum".
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      shared_prefix=True,  # Prompts are read once for a group; the loss is the same.
      chunk=128,  # Time steps whose logits exist at once.
      async_rollouts=False,  # Sample the next rollout before the update; see job.py.
    )
  )


def make(
  config: ConfigDict, parts: MethodModels, *, max_new: int, eos: int, **limits: int
) -> Method:
  """The method; it trains the role "policy".

  It reads from frozen: "policy", "ref" and what parts.score asks for, which is called
  between two jitted functions and so may be a plain function of the host.

  Args:
    max_new: longest response, in tokens.
    eos: id that ends a response.
    limits: pad and vocab; see generate.
  """
  check(config)
  policy = parts.policy
  likelihood: dict[str, Any] = {key: config[key] for key in ("chunk", "temperature")}
  likelihood["shared"] = config.shared_prefix
  logps_of = lambda weights, groups: compute_group_logps(
    policy, weights, groups, **likelihood
  )

  @jax.jit
  def weigh(params: Params, frozen: Params, sampled: SampledResponses, scores, valid):
    batch, start = sampled.batch, sampled.logps.shape[1] - max_new
    groups = group_rows(batch, group=config.samples, start=start)
    in_groups = lambda x: x.reshape(-1, config.samples)
    scores, valid, stopped = map(in_groups, (scores, valid, has_stop(batch, eos)))
    valid &= jnp.isfinite(scores)
    scores = jnp.where(valid, scores, 0.0)
    old_logps = sampled.logps[:, start:].reshape(groups.tokens.shape)
    gap = {}
    if config.old_logps == "computed":
      recorded = old_logps
      old_logps, _ = logps_of(merge_params(frozen["policy"], params["policy"]), groups)
      gap["sampler_gap"] = masked_mean(jnp.abs(recorded - old_logps), groups.loss_mask)
    ref_logps, _ = logps_of(frozen["ref"], groups)
    likely = POLICY_LOGPS_REDUCTIONS[config.policy_logps_reduction](
      old_logps, groups.loss_mask
    )
    advantages, kept, tied = _compared(config, scores, valid, stopped, likely)
    learned = groups._replace(loss_mask=groups.loss_mask & kept[..., None])
    # Not any(): libtpu fuses that with the rows it is of, and aborts for some sizes.
    learns = jnp.sum(learned.loss_mask, axis=2) > 0
    info = compute_rollout_metrics(
      groups.tokens,
      groups.loss_mask,
      estimate_kl(old_logps, ref_logps, estimator="k1"),
      scores=scores,
      valid=valid,
      stopped=stopped,
      advantages=jnp.where(learns, advantages, 0.0),
    )
    info |= gap | {"learned": jnp.mean(learns), "tied": jnp.mean(tied)}
    return GroupRollout(learned, old_logps, ref_logps, advantages), info

  def loss(params, frozen, rollout: GroupRollout) -> Loss:
    logps, entropy = logps_of(
      merge_params(frozen["policy"], params["policy"]), rollout.groups
    )
    return compute_grpo_loss(config, rollout, logps, entropy, max_new)

  collect = make_collector(
    config, policy, parts.score, weigh, max_new=max_new, eos=eos, **limits
  )
  return Method(Batch, collect, loss)


def compute_grpo_loss(
  config: ConfigDict,
  rollout: GroupRollout,
  logps: Float[Array, "prompts group time"],
  entropy: Float[Array, "prompts group time"],
  max_new: int,
) -> Loss:
  """The clipped loss, KL to the anchor and entropy, from what the policy says now."""
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
  over = lambda x: jnp.sum(x * counts, where=mask) / jnp.maximum(total, 1)
  log_ratio = logps - rollout.old_logps
  metrics = {
    "policy_loss": over(surrogate),
    "anchor_kl": over(kl),
    "policy_entropy": over(entropy),
    "clip_fraction": over(jnp.abs(jnp.expm1(log_ratio)) > config.clip_eps),
    "approx_kl": over(0.5 * jnp.square(log_ratio)),
  }
  if config.old_logps == "sampled":
    metrics["sampler_gap"] = over(jnp.abs(log_ratio))  # See loop.AT_FIRST.
  return Loss(mean, total, metrics)


def check(config: ConfigDict) -> None:
  """Checks the settings of the method.

  Raises:
    ValueError: a value is wrong. The message starts with the setting's name.
  """
  check_choices(config, GRPO_CHOICES)
  if config.temperature <= 0:
    raise ValueError(
      f"temperature must be above 0 for a group to differ, not {config.temperature}"
    )
  if config.samples < 2:
    raise ValueError(
      f"samples must be 2 or more, for responses are compared, not {config.samples}"
    )


def _compared(
  config: ConfigDict,
  scores: Float[Array, "prompts group"],
  valid: Bool[Array, "prompts group"],
  stopped: Bool[Array, "prompts group"],
  likely: Float[Array, "prompts group"],
) -> tuple[
  Float[Array, "prompts group"], Bool[Array, "prompts group"], Bool[Array, " prompts"]
]:
  """(advantages, the responses that are learned from, the groups that are tied).

  Args:
    likely: the policy's log-probabilities.
  """
  judged, kept = TRUNCATED_RESPONSES[config.truncated_responses](scores, valid, stopped)
  advantages = ADVANTAGES[config.advantage](judged, kept, likely)
  highest = jnp.max(judged, axis=1, where=kept, initial=-jnp.inf)
  lowest = jnp.min(judged, axis=1, where=kept, initial=jnp.inf)
  tied = highest <= lowest  # An empty group's are -inf and inf.
  if config.drop_uniform_groups:
    kept &= ~tied[:, None]
  return advantages, kept, tied


def _put_last(
  scores: Float[Array, "prompts group"],
  valid: Bool[Array, "prompts group"],
  stopped: Bool[Array, "prompts group"],
) -> Float[Array, "prompts group"]:
  """Scores of what did not stop put 1 below the lowest of the group, all alike."""
  lowest = jnp.min(scores, axis=1, keepdims=True, where=valid, initial=jnp.inf)
  return jnp.where(stopped | ~valid, scores, lowest - 1)
