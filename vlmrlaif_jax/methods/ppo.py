"""PPO against a reward model, with a KL penalty to the reference policy.

Schulman et al. 2017 (1707.06347), as Ouyang et al. 2022 (2203.02155) and VLM-RLAIF
(2402.03746) use it: rewards at the last token, KL per token, GAE, whitened advantages.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vlmrlaif_jax.generate import generate
from vlmrlaif_jax.losses import advantages as adv
from vlmrlaif_jax.losses.logprobs import chunked_token_logps
from vlmrlaif_jax.losses.masked import masked_mean, masked_whiten
from vlmrlaif_jax.losses.policy import (
  approx_kl,
  clip_fraction,
  clipped_policy_loss,
  clipped_value_loss,
)
from vlmrlaif_jax.types import Batch, Loss, Method, Parts, Rollout, join


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      kl_coef=0.1,  # Per nat of KL to the reference; where it starts, if adaptive.
      kl_estimator="k1",  # "k1", "k1_clamped" or "k3".
      kl_target=0.0,  # Nats per response that it adapts to; 0: fixed.
      kl_horizon=10_000.0,  # Responses over which it adapts.
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
      stop_penalty=-1.0,  # For a response without an end.
      length_coef=0.0,  # Times length / response_len.
      chunk=128,  # Time steps whose logits exist at once.
    )
  )


def make(
  config: ConfigDict, parts: Parts, *, max_new: int, eos: int, pad: int, vocab: int
) -> Method:
  """The method; it trains the roles "policy" and "critic".

  It reads from frozen: "policy", "critic", "ref", what parts.score asks for, and
  "kl_coef".

  Args:
    max_new: longest response, in tokens.
    eos: id that ends a response.
    pad: id after it.
    vocab: ids from here on are not sampled.
  """
  policy, critic = parts.policy, parts.critic
  if config.temperature <= 0:
    raise ValueError(
      f"temperature must be above 0 for PPO to explore, not {config.temperature}"
    )

  def logps_of(variables, batch):
    """(log-probability, entropy) of each token, at the temperature of sampling."""
    hidden = policy.apply(variables, batch, method="hidden")
    head = policy.apply(variables, method="head_kernel")
    return chunked_token_logps(
      hidden, head, batch.tokens, chunk=config.chunk, temperature=config.temperature
    )

  def values_of(variables, batch):
    """Value of the state before each token: the head's output one token back."""
    scalars = critic.apply(variables, batch, method="scalars")
    return jnp.pad(scalars[:, :-1], [(0, 0), (1, 0)])

  def counted(batch: Batch) -> Bool[Array, "batch time"]:
    """The tokens that GAE, whitening and losses run over."""
    if config.mask_padding:
      return batch.loss_mask
    window = jnp.arange(batch.mask.shape[1]) >= batch.mask.shape[1] - max_new
    valid = jnp.any(batch.loss_mask, axis=1, keepdims=True)
    return window & valid

  def of_response(x, batch):
    return jnp.where(batch.loss_mask, x, 0.0)

  @jax.jit
  def collect(key, params, frozen, prompts: Batch):
    trained = join(frozen["policy"], params["policy"])
    batch, _ = generate(
      policy,
      trained,
      prompts,
      key,
      max_new=max_new,
      eos=eos,
      pad=pad,
      vocab=vocab,
      temperature=config.temperature,
      top_p=config.top_p,
      top_k=config.top_k,
      samples=config.samples,
    )
    scores, valid = parts.score(frozen, batch)
    batch = batch._replace(loss_mask=batch.loss_mask & valid[:, None])
    scores = jnp.where(valid, scores, 0.0)
    old_logps, entropy = logps_of(trained, batch)
    ref_logps, _ = logps_of(frozen["ref"], batch)
    old_logps, ref_logps = of_response(old_logps, batch), of_response(ref_logps, batch)
    values = values_of(join(frozen["critic"], params["critic"]), batch)
    kl = adv.kl_estimate(old_logps, ref_logps, estimator=config.kl_estimator)
    mask = counted(batch)
    rewards = config.reward_scale * adv.rewards_per_token(
      scores, kl, mask, kl_coef=frozen["kl_coef"]
    )
    if config.whiten_rewards:
      rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = adv.gae(
      rewards, values, mask, gamma=config.gamma, lam=config.lam
    )
    if config.whiten_advantages:
      advantages = masked_whiten(advantages, mask)
    rollout = Rollout(batch, old_logps, ref_logps, values, advantages, returns)
    return rollout, told(rollout, scores, valid, entropy)

  def told(rollout, scores, valid, entropy) -> dict[str, Float[Array, "..."]]:
    batch, mask = rollout.batch, rollout.batch.loss_mask
    kl = adv.kl_estimate(rollout.old_logps, rollout.ref_logps, estimator="k1")
    stopped = jnp.any((batch.tokens == eos) & mask, axis=1)
    first = mask & (jnp.cumsum(mask, axis=1) == 1)
    return {
      "reward": jnp.sum(scores) / jnp.maximum(jnp.sum(valid), 1),
      "kl": jnp.sum(kl, where=mask) / jnp.maximum(jnp.sum(valid), 1),
      "entropy": masked_mean(entropy, mask),
      "length": jnp.sum(mask) / jnp.maximum(jnp.sum(valid), 1),
      "stop_rate": jnp.sum(stopped) / jnp.maximum(jnp.sum(valid), 1),
      "invalid": jnp.sum(~valid).astype(jnp.float32),
      # With a row for each response:
      "tokens": batch.tokens,
      "loss_mask": mask,
      "scores": scores,
      "valid": valid,
      "has_stop": stopped,
      "row_advantages": jnp.sum(rollout.advantages, axis=1, where=first),
    }

  def loss(params, frozen, rollout: Rollout) -> Loss:
    batch, mask = rollout.batch, counted(rollout.batch)
    logps, entropy = logps_of(join(frozen["policy"], params["policy"]), batch)
    logps = of_response(logps, batch)
    values = values_of(join(frozen["critic"], params["critic"]), batch)
    policy_loss = masked_mean(
      clipped_policy_loss(
        logps, rollout.old_logps, rollout.advantages, clip_eps=config.clip_eps
      ),
      mask,
    )
    value_loss = masked_mean(
      clipped_value_loss(
        values, rollout.old_values, rollout.returns, clip_eps=config.value_clip_eps
      ),
      mask,
    )
    total = policy_loss + config.value_coef * value_loss
    clipped = clip_fraction(logps, rollout.old_logps, mask, clip_eps=config.clip_eps)
    return Loss(
      total,
      jnp.sum(mask).astype(jnp.float32),
      {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clip_fraction": clipped,
        "approx_kl": approx_kl(logps, rollout.old_logps, mask),
        "returns": masked_mean(rollout.returns, mask),
        "values": masked_mean(values, mask),
      },
    )

  return Method(Batch, collect, loss)
