"""Reward model: a scalar head trained on pairs by Bradley-Terry."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vlmrlaif_jax.losses.masked import masked_mean
from vlmrlaif_jax.losses.preference import bradley_terry_loss, centre_penalty
from vlmrlaif_jax.types import (
  Loss,
  Method,
  Packed,
  Pairs,
  Params,
  Parts,
  join,
  offline,
)


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      margin=0.0,  # By which the better answer is to score higher.
      centre_coef=1e-3,  # Of |mean of all scores|, VLM-RLAIF reward_model.py:306.
    )
  )


def make(config: ConfigDict, parts: Parts) -> Method:
  """The method; it trains the role "reward". It takes packed pairs, too."""
  model = parts.reward_model

  def loss(params, frozen, pairs: Pairs | Packed) -> Loss:
    variables = join(frozen["reward"], params["reward"])
    scores_of = packed_scores if isinstance(pairs, Packed) else pair_scores
    scores, real = scores_of(model, variables, pairs)
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

  return Method(Pairs, offline, loss)


def pair_scores(
  model: Any, variables: Params, pairs: Pairs
) -> tuple[Float[Array, "pairs 2"], Bool[Array, " pairs"]]:
  """(scores of chosen and rejected answers, which of them are pairs: all).

  Both answers of a pair go through in one forward pass.
  """
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pairs)
  scores = model.apply(variables, both, method="scores").reshape(2, -1).T
  return scores, jnp.ones(len(scores), bool)


def packed_scores(
  model: Any, variables: Params, pairs: Packed
) -> tuple[Float[Array, "pairs 2"], Bool[Array, " pairs"]]:
  """(scores of chosen and rejected answers, which of them are pairs)."""
  scores = model.apply(variables, pairs, method="segment_scores")
  real = jnp.any(pairs.members(), axis=2)
  return scores.reshape(-1, 2), real.reshape(-1, 2)[:, 0]
