"""PPO with a reward model and a KL penalty to the reference policy.

Schulman et al. 2017 (1707.06347), as used by Ouyang et al. 2022 (2203.02155) and
VLM-RLAIF (2402.03746). The score is the reward of the last token, and every token has a
KL penalty. Advantages are whitened GAE advantages.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import check_at_least, check_choices
from vlmrlaif_jax.core.types import (
  AnyArray,
  Batch,
  Loss,
  Method,
  MethodModels,
  Params,
  Rollout,
  Stops,
  has_stop,
  merge_params,
)
from vlmrlaif_jax.losses import advantages as adv
from vlmrlaif_jax.losses.masked import masked_mean, masked_whiten
from vlmrlaif_jax.losses.policy import (
  approx_kl,
  clip_fraction,
  clipped_policy_loss,
  clipped_value_loss,
  truncated_importance_weights,
)
from vlmrlaif_jax.methods._rollout import compute_rollout_metrics, make_collector
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.sampling.generate import SampledResponses, compute_response_logps


def default_config() -> ConfigDict:
  """Returns the settings of PPO."""
  return ConfigDict(
    dict(
      kl_coef=placeholder(float),  # Penalty per nat of KL to the reference policy.
      kl_estimator="k1",  # "k1", "k1_clamped" or "k3"; see advantages.estimate_kl.
      gamma=1.0,  # Discount per token, 0 to 1.
      lam=0.95,  # Lambda of GAE, 0 to 1.
      clip_eps=0.2,  # Maximum change of a token's probability ratio.
      tis_max=0.0,  # Maximum of truncated importance weights; 0 disables them.
      value_clip_eps=0.2,  # Maximum change of a value; inf disables clipping.
      # Weight of the value loss. The critic has parameters of its own, so under Adam it
      # acts through the joint clipping of gradients only.
      value_coef=0.1,
      reward_scale=1.0,  # Factor of rewards before GAE; 10 in VLM-RLAIF's code.
      whiten_rewards=False,  # Scale rewards to variance 1 around the same mean.
      whiten_advantages=True,  # Scale advantages to mean 0 and variance 1.
      mask_padding=True,  # False includes padding in losses and GAE, as VLM-RLAIF does.
      temperature=1.0,  # Sampling temperature, above 0.
      top_p=1.0,  # Nucleus probability mass; 1 disables it.
      top_k=0,  # Number of candidate tokens; 0 disables it.
      samples=1,  # Responses per prompt.
      slots=0,  # Responses that are decoded concurrently; 0 for all.
      chunk=128,  # Time steps whose logits are computed together.
    )
  )


def make(
  config: ConfigDict, parts: MethodModels, *, max_new: int, stops: Stops, **limits: int
) -> Method:
  """Returns PPO, which trains the roles "policy" and "critic".

  It reads "policy", "critic", "ref" and the roles of parts.score from frozen.
  parts.score may be a function of the host. `generate` describes max_new, stops and the
  limits pad and vocab.
  """
  check(config)
  policy, critic = parts.policy, parts.critic
  logps_kwargs = dict(chunk=config.chunk, temperature=config.temperature)

  def compute_logps(variables, batch):
    start = batch.tokens.shape[1] - max_new
    return compute_response_logps(policy, variables, batch, start=start, **logps_kwargs)

  @jax.jit
  def prepare_rollout(params, frozen, sampled: SampledResponses, scores, valid):
    batch = sampled.batch
    batch = batch._replace(loss_mask=batch.loss_mask & valid[:, None])
    scores = jnp.where(valid, scores, 0.0)
    variables = merge_params(frozen["policy"], params["policy"])
    old_logps, entropy = compute_logps(variables, batch)
    ref_logps, _ = compute_logps(frozen["ref"], batch)
    variables = merge_params(frozen["critic"], params["critic"])
    values = compute_state_values(critic, variables, batch)
    mask = loss_window_mask(config, batch, max_new)
    advantages, returns = compute_advantages(
      config, scores, old_logps, ref_logps, values, mask
    )
    weights = compute_policy_weights(config, old_logps, sampled.logps, batch.loss_mask)
    rollout = Rollout(batch, old_logps, ref_logps, values, advantages, returns, weights)
    first = batch.loss_mask & (jnp.cumsum(batch.loss_mask, axis=1) == 1)
    info = compute_rollout_metrics(
      batch.tokens,
      batch.loss_mask,
      adv.estimate_kl(old_logps, ref_logps, estimator="k1"),
      scores=scores,
      valid=valid,
      stopped=has_stop(batch, stops),
      advantages=jnp.sum(advantages, axis=1, where=first),
    )
    gap = masked_mean(jnp.abs(sampled.logps - old_logps), batch.loss_mask)
    info |= {"entropy": masked_mean(entropy, batch.loss_mask), "sampler_gap": gap}
    if config.tis_max:
      info["tis_weight"] = masked_mean(weights, batch.loss_mask)
    return rollout, info

  def loss(params, frozen, rollout: Rollout) -> Loss:
    batch, mask = rollout.batch, loss_window_mask(config, rollout.batch, max_new)
    logps, _ = compute_logps(merge_params(frozen["policy"], params["policy"]), batch)
    values = compute_state_values(
      critic, merge_params(frozen["critic"], params["critic"]), batch
    )
    return compute_ppo_loss(config, rollout, logps, values, mask)

  sampling = {"max_new": max_new, "stops": stops, **limits}
  collect = make_collector(config, parts, prepare_rollout, **sampling)
  return Method(Batch, collect, loss)


def check(config: ConfigDict) -> None:
  """Checks the settings of the method.

  Raises:
    ValueError: a value is invalid. The message starts with the setting's name.
  """
  check_choices(config, {"kl_estimator": adv.KL_ESTIMATORS})
  check_at_least(config, {"tis_max": 0})
  if config.temperature <= 0:
    raise ValueError(
      f"temperature must be above 0 for PPO to explore, not {config.temperature}"
    )


def compute_ppo_loss(
  config: ConfigDict,
  rollout: Rollout,
  logps: Float[Array, "batch time"],
  values: Float[Array, "batch time"],
  mask: Bool[Array, "batch time"],
) -> Loss:
  """Computes policy_loss + value_coef * value_loss: 1707.06347, eq. 9, negated.

  The entropy bonus of the equation is left out. Tokens of the policy loss have the
  weights of the rollout. `logps` and `values` are those of the trained policy and
  critic; losses are means over `mask`.
  """
  policy_losses = rollout.policy_weights * clipped_policy_loss(
    logps, rollout.old_logps, rollout.advantages, clip_eps=config.clip_eps
  )
  value_losses = clipped_value_loss(
    values, rollout.old_values, rollout.returns, clip_eps=config.value_clip_eps
  )
  metrics = {
    "policy_loss": masked_mean(policy_losses, mask),
    "value_loss": masked_mean(value_losses, mask),
    "clip_fraction": clip_fraction(
      logps, rollout.old_logps, mask, clip_eps=config.clip_eps
    ),
    "approx_kl": approx_kl(logps, rollout.old_logps, mask),
    "returns": masked_mean(rollout.returns, mask),
    "values": masked_mean(values, mask),
  }
  total = metrics["policy_loss"] + config.value_coef * metrics["value_loss"]
  return Loss(total, jnp.sum(mask).astype(jnp.float32), metrics)


def compute_policy_weights(
  config: ConfigDict,
  old_logps: Float[Array, "batch time"],
  sampler_logps: Float[Array, "batch time"],
  mask: Bool[AnyArray, "batch time"],
) -> Float[Array, "batch time"]:
  """Computes truncated importance weights of tokens in the mask, and 1 elsewhere.

  They are 1 without `tis_max`.
  """
  if not config.tis_max:
    return jnp.ones_like(old_logps)
  weights = truncated_importance_weights(
    old_logps, sampler_logps, max_weight=config.tis_max
  )
  return jnp.where(mask, weights, 1.0)


def compute_state_values(
  critic: VLM, variables: Params, batch: Batch
) -> Float[Array, "batch time"]:
  """Returns the value of the state before each token: the head's output one token back.

  The first token has value 0.
  """
  scalars = critic.bind(variables).scalars(batch)
  return jnp.pad(scalars[:, :-1], [(0, 0), (1, 0)])


def loss_window_mask(
  config: ConfigDict, batch: Batch, max_new: int
) -> Bool[Array, "batch time"]:
  """Returns the mask of the tokens for GAE, whitening and losses."""
  if config.mask_padding:
    return jnp.asarray(batch.loss_mask)
  window = jnp.arange(batch.mask.shape[1]) >= batch.mask.shape[1] - max_new
  valid = jnp.any(batch.loss_mask, axis=1, keepdims=True)
  return window & valid


def compute_advantages(
  config: ConfigDict,
  scores: Float[Array, " batch"],
  old_logps: Float[Array, "batch time"],
  ref_logps: Float[Array, "batch time"],
  values: Float[Array, "batch time"],
  mask: Bool[Array, "batch time"],
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
  """Computes GAE advantages and returns from scores and KL penalties."""
  kl = adv.estimate_kl(old_logps, ref_logps, estimator=config.kl_estimator)
  rewards = config.reward_scale * adv.compute_token_rewards(
    scores, kl, mask, kl_coef=config.kl_coef
  )
  if config.whiten_rewards:
    rewards = masked_whiten(rewards, mask, shift_mean=False)
  advantages, returns = adv.compute_gae(
    rewards, values, mask, gamma=config.gamma, lam=config.lam
  )
  if config.whiten_advantages:
    advantages = masked_whiten(advantages, mask)
  return advantages, returns
