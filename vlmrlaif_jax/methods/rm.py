"""Reward model: trains a scalar head on pairs with the Bradley-Terry loss."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import (
  Groups,
  Loss,
  Method,
  MethodModels,
  merge_params,
  offline,
  select_rngs,
)
from vlmrlaif_jax.losses.preference import bradley_terry_loss, center_penalty


def default_config() -> ConfigDict:
  """Returns the settings of the reward model."""
  return ConfigDict(
    dict(
      margin=0.0,  # Required score difference of a pair; 0 disables it.
      centre_coef=1e-3,  # Weight of |mean score|; VLM-RLAIF, reward_model.py:306.
      shared_prefix=True,  # Run the prompt of a pair once; the loss is the same.
    )
  )


def make(config: ConfigDict, parts: MethodModels) -> Method:
  """Returns the method, which trains the role "reward" and reads it from frozen."""
  model = parts.reward_model

  def loss(params, frozen, pairs: Groups) -> Loss:
    variables = merge_params(frozen["reward"], params["reward"])
    shared = config.shared_prefix
    scores = model.apply(
      variables, pairs, shared=shared, method="group_scores", rngs=select_rngs(frozen)
    )
    chosen, rejected = scores.T
    mean = jnp.mean
    ranking = mean(bradley_terry_loss(chosen, rejected, margin=config.margin))
    penalty = center_penalty(chosen, rejected, jnp.ones(len(scores), bool))
    return Loss(
      ranking + config.centre_coef * penalty,
      jnp.float32(len(scores)),
      {
        "ranking_loss": ranking,
        "accuracy": mean((chosen > rejected).astype(jnp.float32)),
        "gap": mean(chosen - rejected),
        "score": mean((chosen + rejected) / 2),
      },
    )

  return Method(Groups, offline, loss)
