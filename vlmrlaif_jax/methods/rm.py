"""Reward model: a scalar head trained on pairs by Bradley-Terry."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import (
  Groups,
  Loss,
  Method,
  Packed,
  Params,
  Parts,
  join,
  offline,
)
from vlmrlaif_jax.losses.masked import masked_mean
from vlmrlaif_jax.losses.preference import bradley_terry_loss, centre_penalty


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      margin=0.0,  # By which the better answer is to score higher.
      centre_coef=1e-3,  # Of |mean of all scores|, VLM-RLAIF reward_model.py:306.
      shared_prefix=True,  # The prompt of a pair is read once; the loss is the same.
    )
  )


def make(config: ConfigDict, parts: Parts) -> Method:
  """The method; it trains the role "reward". It takes packed pairs, too."""
  model = parts.reward_model

  def loss(params, frozen, pairs: Groups | Packed) -> Loss:
    variables = join(frozen["reward"], params["reward"])
    if isinstance(pairs, Packed):
      scores, real = packed_scores(model, variables, pairs)
    else:
      shared = config.shared_prefix
      scores = model.apply(variables, pairs, shared=shared, method="group_scores")
      real = jnp.ones(len(scores), bool)
    chosen, rejected = scores.T
    mean = lambda x: masked_mean(x, real)
    ranking = mean(bradley_terry_loss(chosen, rejected, margin=config.margin))
    centre = centre_penalty(chosen, rejected, real)
    return Loss(
      ranking + config.centre_coef * centre,
      jnp.sum(real).astype(jnp.float32),
      {
        "ranking_loss": ranking,
        "accuracy": mean((chosen > rejected).astype(jnp.float32)),
        "gap": mean(chosen - rejected),
        "score": mean((chosen + rejected) / 2),
      },
    )

  return Method(Groups, offline, loss)


def packed_scores(
  model: Any, variables: Params, pairs: Packed
) -> tuple[Float[Array, "pairs 2"], Bool[Array, " pairs"]]:
  """(scores of chosen and rejected answers, which of them are pairs)."""
  scores = model.apply(variables, pairs, method="segment_scores")
  real = jnp.any(pairs.members(), axis=2)
  return scores.reshape(-1, 2), real.reshape(-1, 2)[:, 0]
