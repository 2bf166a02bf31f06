"""Reward model: a scalar head trained on pairs by Bradley-Terry."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.losses.preference import bradley_terry_loss, centre_penalty
from vlmrlaif_jax.types import Loss, Method, Pairs, Parts, join, offline


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      margin=0.0,  # By which the better answer is to score higher.
      centre_coef=1e-3,  # Of |mean of all scores|, VLM-RLAIF reward_model.py:306.
    )
  )


def make(config: ConfigDict, parts: Parts) -> Method:
  """The method; it trains the role "reward".

  Both answers of a pair go through in one forward pass: their rows share a video.
  """
  model = parts.reward_model

  def loss(params, frozen, pairs: Pairs) -> Loss:
    variables = join(frozen["reward"], params["reward"])
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pairs)
    scores = model.apply(variables, both, method="scores")
    chosen, rejected = jnp.split(scores, 2)
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

  return Method(Pairs, offline, loss)
