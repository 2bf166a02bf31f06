"""Sampling, scoring and metrics of rollouts, shared by PPO and GRPO."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import (
  AnyArray,
  Batch,
  Collector,
  MethodModels,
  Params,
  Phase,
  merge_params,
)
from vlmrlaif_jax.sampling.generate import SAMPLING_SETTINGS, generate


def make_collector(
  config: ConfigDict, parts: MethodModels, prepare_rollout: Callable, **limits: Any
) -> Collector:
  """Returns the collector of a method: it samples and scores responses.

  Args:
    config: the settings of the method.
    parts: its policy samples with the weights of the role "policy", unless it has a
      sampler. Its score may be a function of the host, because it is called between two
      jitted functions.
    prepare_rollout: jitted function of (params, frozen, sampled, scores, valid) that
      returns (rollout, info). If info has a row for some of the responses only, it
      contains "sampled_rows", the position of each row among all sampled responses.
    **limits: max_new, stops, pad and vocab; see generate.
  """
  settings: dict[str, Any] = {key: config[key] for key in SAMPLING_SETTINGS} | limits
  sampler = parts.sampler

  @jax.jit
  def sample(key: Key[Array, ""], params: Params, frozen: Params, prompts: Batch):
    variables = merge_params(frozen["policy"], params["policy"])
    return generate(parts.policy, variables, prompts, key, **settings)

  def finish(params: Params, frozen: Params, sampled: Any, phase: Phase):
    with phase("sample"):
      sampled = sampler.finish(sampled) if sampler else sampled
      jax.block_until_ready(sampled)
    with phase("score"):
      scores, valid = jax.block_until_ready(parts.score(frozen, sampled.batch))
    rollout, info = prepare_rollout(params, frozen, sampled, scores, valid)
    rows = np.arange(len(sampled.batch.tokens))
    return rollout, {"sampled_rows": jnp.asarray(rows)} | info

  return Collector(sampler.begin if sampler else sample, finish)


def compute_rollout_metrics(
  tokens: Int[AnyArray, "*rows time"],
  mask: Bool[AnyArray, "*rows time"],
  kl: Float[Array, "*rows time"],
  *,
  scores: Float[Array, "*rows"],
  valid: Bool[Array, "*rows"],
  stopped: Bool[Array, "*rows"],
  advantages: Float[Array, "*rows"],
) -> dict[str, AnyArray]:
  """Returns means over valid responses, and arrays with a row for each response.

  Args:
    tokens: token ids; the rows of PPO start with the prompt.
    mask: True for the tokens of responses, including invalid ones.
    kl: estimated KL(policy || reference) in nats per token.
    scores: scores of the responses; 0 where invalid.
    valid: whether a response has a score.
    stopped: whether a response has an EOS token.
    advantages: advantages of whole responses.
  """
  kl = jnp.where(mask & valid[..., None], kl, 0.0)
  mean = lambda x: jnp.sum(x) / jnp.maximum(jnp.sum(valid), 1)
  rows = lambda x: x.reshape(-1, *x.shape[scores.ndim :])
  reward = mean(scores)
  spread = jnp.where(valid, jnp.square(scores - reward), 0.0)
  return {
    "reward": reward,
    "reward_std": jnp.sqrt(mean(spread)),
    "kl": mean(kl),
    "length": mean(mask & valid[..., None]),
    "stop_rate": mean(stopped & valid),
    "invalid": jnp.sum(~valid).astype(jnp.float32),
    "tokens": rows(tokens),
    "loss_mask": rows(mask),
    "scores": rows(scores),
    "valid": rows(valid),
    "has_stop": rows(stopped),
    "row_advantages": rows(advantages),
    "row_kl": rows(jnp.sum(kl, axis=-1)),
  }
