"""Direct preference optimization (DPO): trains the policy on preference pairs.

Rafailov et al. 2023 (2305.18290), with the settings of RLAIF-V (2405.17220).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import (
  ComparedPairs,
  Groups,
  Loss,
  Method,
  MethodModels,
  Params,
  merge_params,
  offline,
  select_rngs,
)
from vlmrlaif_jax.losses.logprobs import sum_logps
from vlmrlaif_jax.losses.preference import dpo_loss
from vlmrlaif_jax.sampling.generate import compute_group_logps


def default_config() -> ConfigDict:
  """Returns the settings of DPO."""
  return ConfigDict(
    dict(
      beta=0.1,  # Strength of the implied KL penalty to the reference policy.
      sft_coef=0.0,  # Weight of the chosen response's -log p; 0 disables it.
      shared_prefix=True,  # Run the prompt of a pair once; the loss is the same.
      chunk=128,  # Time steps whose logits are computed together.
    )
  )


def make(config: ConfigDict, parts: MethodModels) -> Method:
  """Returns DPO, which trains the role "policy" and reads "policy" from frozen.

  The batch contains the reference's log-probabilities; see `compute_pair_logps`.
  """
  check(config)

  def loss(params, frozen, data: ComparedPairs) -> Loss:
    variables = merge_params(frozen["policy"], params["policy"])
    rngs = select_rngs(frozen)
    logps = compute_pair_logps(config, parts.policy, variables, data.pairs, rngs)
    chosen, rejected = logps.T
    preference = dpo_loss(chosen, rejected, *data.ref_logps.T, beta=config.beta)
    each = preference - config.sft_coef * chosen
    good, bad = config.beta * (logps - data.ref_logps).T
    mean = jnp.mean
    return Loss(
      mean(each),
      jnp.float32(len(logps)),
      {
        "dpo_loss": mean(preference),
        "accuracy": mean((good > bad).astype(jnp.float32)),
        "margin": mean(good - bad),
        "chosen_reward": mean(good),
        "rejected_reward": mean(bad),
        "chosen_logps": mean(chosen),
        "rejected_logps": mean(rejected),
      },
    )

  return Method(ComparedPairs, offline, loss)


def compute_pair_logps(
  config: ConfigDict,
  model: Any,
  variables: Params,
  pairs: Groups,
  rngs: Mapping[str, Array] | None = None,
) -> Float[Array, "prompts 2"]:
  """Computes log-probabilities in nats of chosen and rejected responses.

  The temperature is 1. `rngs` are the random keys of dropout.
  """
  settings = dict(shared=config.shared_prefix, chunk=config.chunk, temperature=1.0)
  logps, _ = compute_group_logps(model, variables, pairs, **settings, rngs=rngs)
  return sum_logps(logps, pairs.loss_mask)


def check(config: ConfigDict) -> None:
  """Checks the settings of the method.

  Raises:
    ValueError: a value is invalid. The message starts with the setting's name.
  """
  if config.beta <= 0:
    raise ValueError(f"beta must be above 0, not {config.beta}")
