"""PPO against a reward model, with a KL penalty to the reference policy.

Schulman et al. 2017 (1707.06347), as Ouyang et al. 2022 (2203.02155) and VLM-RLAIF
(2402.03746) use it: rewards at the last token, KL per token, GAE, whitened advantages.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import check_choices
from vlmrlaif_jax.core.types import (
  Batch,
  Loss,
  Method,
  MethodModels,
  Params,
  Rollout,
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
)
from vlmrlaif_jax.methods._rollout import compute_rollout_metrics, make_collector
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.sampling.generate import SampledResponses, compute_response_logps


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      kl_coef=placeholder(float),  # Per nat of KL to the reference.
      kl_estimator="k1",  # "k1", "k1_clamped" or "k3".
      gamma=1.0,
      lam=0.95,
      clip_eps=0.2,
      value_clip_eps=0.2,  # inf: values are not clipped.
      value_coef=0.1,
      reward_scale=1.0,  # Of rewards before GAE; the original's is 10.
      whiten_rewards=False,  # By their deviation alone.
      whiten_advantages=True,
      mask_padding=True,  # False: losses and GAE run over padding, as the original's.
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      samples=1,  # Responses to each prompt.
      slots=0,  # Responses in the making at once, see generate; 0: all.
      stop_penalty=-1.0,  # For a response without an end.
      length_coef=0.0,  # Times length / response_len.
      chunk=128,  # Time steps whose logits exist at once.
      async_rollouts=False,  # Sample the next rollout before the update; see job.py.
    )
  )


def make(
  config: ConfigDict, parts: MethodModels, *, max_new: int, eos: int, **limits: int
) -> Method:
  """The method; it trains the roles "policy" and "critic".

  It reads from frozen: "policy", "critic", "ref" and what parts.score asks.

  Args:
    max_new: longest response, in tokens.
    eos: id that ends a response.
    limits: pad and vocab; see generate.
  """
  check(config)
  policy, critic = parts.policy, parts.critic
  likelihood = dict(chunk=config.chunk, temperature=config.temperature)

  def logps_of(variables, batch):
    start = batch.tokens.shape[1] - max_new
    return compute_response_logps(policy, variables, batch, start=start, **likelihood)

  @jax.jit
  def weigh(params, frozen, sampled: SampledResponses, scores, valid):
    batch = sampled.batch
    batch = batch._replace(loss_mask=batch.loss_mask & valid[:, None])
    scores = jnp.where(valid, scores, 0.0)
    old_logps, entropy = logps_of(
      merge_params(frozen["policy"], params["policy"]), batch
    )
    ref_logps, _ = logps_of(frozen["ref"], batch)
    values = compute_state_values(
      critic, merge_params(frozen["critic"], params["critic"]), batch
    )
    mask = loss_window_mask(config, batch, max_new)
    advantages, returns = compute_advantages(
      config, scores, old_logps, ref_logps, values, mask
    )
    rollout = Rollout(batch, old_logps, ref_logps, values, advantages, returns)
    learned = batch.loss_mask
    first = learned & (jnp.cumsum(learned, axis=1) == 1)
    info = compute_rollout_metrics(
      batch.tokens,
      learned,
      adv.estimate_kl(old_logps, ref_logps, estimator="k1"),
      scores=scores,
      valid=valid,
      stopped=has_stop(batch, eos),
      advantages=jnp.sum(advantages, axis=1, where=first),
    )
    gap = masked_mean(jnp.abs(sampled.logps - old_logps), learned)
    info |= {"entropy": masked_mean(entropy, learned), "sampler_gap": gap}
    return rollout, info

  def loss(params, frozen, rollout: Rollout) -> Loss:
    batch, mask = rollout.batch, loss_window_mask(config, rollout.batch, max_new)
    logps, _ = logps_of(merge_params(frozen["policy"], params["policy"]), batch)
    values = compute_state_values(
      critic, merge_params(frozen["critic"], params["critic"]), batch
    )
    return compute_ppo_loss(config, rollout, logps, values, mask)

  score = jax.jit(parts.score)
  collect = make_collector(
    config, policy, score, weigh, max_new=max_new, eos=eos, **limits
  )
  return Method(Batch, collect, loss)


def check(config: ConfigDict) -> None:
  """Checks the settings of the method.

  Raises:
    ValueError: a value is wrong. The message starts with the setting's name.
  """
  check_choices(config, {"kl_estimator": adv.KL_ESTIMATORS})
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
  """The clipped losses of policy and critic, from what both say now."""
  policy_losses = clipped_policy_loss(
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


def compute_state_values(
  critic: VLM, variables: Params, batch: Batch
) -> Float[Array, "batch time"]:
  """Value of the state before each token: the head's output one token back."""
  scalars = critic.bind(variables).scalars(batch)
  return jnp.pad(scalars[:, :-1], [(0, 0), (1, 0)])


def loss_window_mask(
  config: ConfigDict, batch: Batch, max_new: int
) -> Bool[Array, "batch time"]:
  """The tokens that GAE, whitening and losses run over."""
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
  """(advantages, returns) from scores, less KL to the reference, by GAE."""
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
