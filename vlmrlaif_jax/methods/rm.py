"""Reward model: a scalar head trained on pairs by Bradley-Terry."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import (
  Groups,
  Loss,
  Method,
  MethodModels,
  merge_params,
  offline,
)
from vlmrlaif_jax.losses.preference import bradley_terry_loss, center_penalty


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      margin=0.0,  # By which the better answer is to score higher.
      centre_coef=1e-3,  # Of |mean of all scores|, VLM-RLAIF reward_model.py:306.
      shared_prefix=True,  # The prompt of a pair is read once; the loss is the same.
    )
  )


def make(config: ConfigDict, parts: MethodModels) -> Method:
  """The method; it trains the role "reward"."""
  model = parts.reward_model

  def loss(params, frozen, pairs: Groups) -> Loss:
    variables = merge_params(frozen["reward"], params["reward"])
    shared = config.shared_prefix
    scores = model.apply(variables, pairs, shared=shared, method="group_scores")
    chosen, rejected = scores.T
    mean = jnp.mean
    ranking = mean(bradley_terry_loss(chosen, rejected, margin=config.margin))
    centre = center_penalty(chosen, rejected, jnp.ones(len(scores), bool))
    return Loss(
      ranking + config.centre_coef * centre,
      jnp.float32(len(scores)),
      {
        "ranking_loss": ranking,
        "accuracy": mean((chosen > rejected).astype(jnp.float32)),
        "gap": mean(chosen - rejected),
        "score": mean((chosen + rejected) / 2),
      },
    )

  return Method(Groups, offline, loss)
