"""Computes the scalar scores of a reward model.

`make_model_score` is the main function. The package `terms` combines the scores with
other terms of a reward.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlmrlaif_jax.core.types import (
  AnyArray,
  Batch,
  Groups,
  Params,
  continue_positions,
)
from vlmrlaif_jax.models.vlm import VLM

RowsT = TypeVar("RowsT", Batch, Groups)
ScoreFn = Callable[
  [Params, Batch], tuple[Float[AnyArray, " batch"], Bool[AnyArray, " batch"]]
]


def append_suffix(batch: RowsT, suffix: Sequence[int]) -> RowsT:
  """Appends tokens, such as the reward prompt, to every response.

  The padding between a response and the suffix is masked. A model reads the suffix
  directly after the last token of the response.
  """
  time = batch.tokens.ndim - 1
  shape = (*batch.tokens.shape[:-1], len(suffix))
  rows = jnp.broadcast_to(jnp.asarray(suffix, batch.tokens.dtype), shape)
  real = jnp.ones(shape, bool)
  positions = continue_positions(batch, real)
  append = lambda x, y: jnp.concatenate([x, y], axis=time)
  return batch._replace(
    tokens=append(batch.tokens, rows),
    mask=append(batch.mask, real),
    loss_mask=append(batch.loss_mask, ~real),
    positions=append(batch.positions, positions),
  )


def compute_scalar_scores(
  model: VLM, variables: Params, batch: Batch, suffix: Sequence[int]
) -> Float[Array, " batch"]:
  """Computes the reward model's score at the last token of the reward prompt."""
  return model.bind(variables).scores(append_suffix(batch, suffix))


def make_model_score(model: VLM, suffix: Sequence[int]) -> ScoreFn:
  """Returns a scorer: the reward model of the role "reward".

  Args:
    model: Reward model with a scalar head.
    suffix: Tokens of the reward prompt.
  """

  def score(frozen, batch):
    scores = compute_scalar_scores(model, frozen["reward"], batch, suffix)
    return scores, jnp.isfinite(scores)

  return jax.named_call(score, name="score")
