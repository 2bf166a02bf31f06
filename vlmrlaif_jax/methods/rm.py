"""Reward model: a scalar head trained on pairs by Bradley-Terry."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.losses.preference import bradley_terry_loss, centre_penalty
from vlmrlaif_jax.types import Groups, Loss, Method, Parts, join, offline


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      margin=0.0,  # By which the better answer is to score higher.
      centre_coef=1e-3,  # Of |mean of all scores|, VLM-RLAIF reward_model.py:306.
      shared_prefix=True,  # The prompt of a pair is read once; the loss is the same.
    )
  )


def make(config: ConfigDict, parts: Parts) -> Method:
  """The method; it trains the role "reward"."""
  model = parts.reward_model

  def loss(params, frozen, pairs: Groups) -> Loss:
    variables = join(frozen["reward"], params["reward"])
    scores = model.apply(
      variables, pairs, shared=config.shared_prefix, method="group_scores"
    )
    chosen, rejected = scores.T
    ranking = jnp.mean(bradley_terry_loss(chosen, rejected, margin=config.margin))
    total = ranking + config.centre_coef * centre_penalty(chosen, rejected)
    return Loss(
      total,
      jnp.float32(len(chosen)),
      {
        "ranking_loss": ranking,
        "accuracy": jnp.mean(chosen > rejected),
        "gap": jnp.mean(chosen - rejected),
        "score": jnp.mean(scores),
      },
    )

  return Method(Groups, offline, loss)
