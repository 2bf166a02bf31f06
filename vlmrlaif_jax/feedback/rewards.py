"""Computes scalar rewards: the score of a reward model plus two rules.

`make_reward_fn` is the main function. The rules are a penalty for truncated responses
and a length bonus.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.core.types import (
  Batch,
  Groups,
  Params,
  Stops,
  continue_positions,
  has_stop,
)
from vlmrlaif_jax.models.vlm import VLM

RowsT = TypeVar("RowsT", Batch, Groups)
ScoreFn = Callable[
  [Params, Batch], tuple[Float[Array, " batch"], Bool[Array, " batch"]]
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


def compute_stop_penalty(
  batch: Batch, stops: Stops, *, penalty: float
) -> Float[Array, " batch"]:
  """Returns `penalty`, below 0, for responses without EOS (VLM-RLAIF: -8)."""
  return jnp.where(has_stop(batch, stops), 0.0, penalty)


def compute_length_bonus(
  batch: Batch, *, coef: float, max_response_len: int
) -> Float[Array, " batch"]:
  """Computes coef * length / max_response_len, in tokens (VLM-RLAIF: -10 and 896)."""
  return coef * jnp.sum(batch.loss_mask, axis=1) / max_response_len


def make_reward_fn(
  model: VLM,
  *,
  suffix: Sequence[int],
  stops: Stops,
  penalty: float,
  length_coef: float,
  max_response_len: int,
) -> ScoreFn:
  """Returns a scorer: the reward model of the role "reward" plus the rules.

  Args:
    model: Reward model with a scalar head.
    suffix: Tokens of the reward prompt.
    stops: Ids of the EOS tokens.
    penalty: Reward of a response without EOS; 0 disables.
    length_coef: Coefficient of the length bonus; 0 disables.
    max_response_len: Length that has the whole bonus, in tokens.
  """

  def score(frozen, batch):
    scores = compute_scalar_scores(model, frozen["reward"], batch, suffix)
    scores += compute_stop_penalty(batch, stops, penalty=penalty)
    scores += compute_length_bonus(
      batch, coef=length_coef, max_response_len=max_response_len
    )
    return scores, jnp.isfinite(scores)

  return jax.named_call(score, name="score")


def split_reward_terms(
  scores: Float[np.ndarray, " batch"],
  lengths: Int[np.ndarray, " batch"],
  stopped: Bool[np.ndarray, " batch"],
  *,
  penalty: float,
  length_coef: float,
  max_response_len: int,
) -> dict[str, Float[np.ndarray, " batch"]]:
  """Splits scores of `make_reward_fn`, by the same settings, into their terms.

  `lengths` is in tokens, and `stopped` is whether a response has EOS. A disabled rule
  has no term.
  """
  rules = {}
  if penalty:
    rules["no end"] = np.where(stopped, 0.0, penalty)
  if length_coef:
    rules["length"] = length_coef * lengths / max_response_len
  return {"reward model": scores - sum(rules.values()), **rules}
