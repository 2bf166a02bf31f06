"""Scalar scores of responses: a reward model's, and rules added to it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmrlaif_jax.core.types import Batch, Groups, Params, has_stop
from vlmrlaif_jax.models.vlm import VLM

RowsT = TypeVar("RowsT", Batch, Groups)
ScoreFn = Callable[
  [Params, Batch], tuple[Float[Array, " batch"], Bool[Array, " batch"]]
]


def append_suffix(batch: RowsT, suffix: Sequence[int]) -> RowsT:
  """The same with some tokens after every response, such as the reward prompt.

  What a response's padding leaves between it and the suffix is masked, so a model sees
  the suffix right after the response's last token.
  """
  shape = (*batch.tokens.shape[:-1], len(suffix))
  more = jnp.broadcast_to(jnp.asarray(suffix, batch.tokens.dtype), shape)
  append = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=-1)
  return batch._replace(
    tokens=append(batch.tokens, more),
    mask=append(batch.mask, jnp.ones_like(more)),
    loss_mask=append(batch.loss_mask, jnp.zeros_like(more)),
  )


def compute_scalar_scores(
  model: VLM, variables: Params, batch: Batch, suffix: Sequence[int]
) -> Float[Array, " batch"]:
  """The reward model's score, read at the last token of the reward prompt."""
  return model.bind(variables).scores(append_suffix(batch, suffix))


def compute_stop_penalty(
  batch: Batch, eos: int, *, penalty: float
) -> Float[Array, " batch"]:
  """`penalty`, below 0, for a response without an end (VLM-RLAIF: -8)."""
  return jnp.where(has_stop(batch, eos), 0.0, penalty)


def compute_length_bonus(
  batch: Batch, *, coef: float, longest: int
) -> Float[Array, " batch"]:
  """coef times length / longest, in tokens (VLM-RLAIF: coef -10, longest 896)."""
  return coef * jnp.sum(batch.loss_mask, axis=1) / longest


def make_reward_fn(
  model: VLM,
  *,
  suffix: Sequence[int],
  eos: int,
  penalty: float,
  length_coef: float,
  longest: int,
) -> ScoreFn:
  """A scorer: the reward model in the role "reward", plus the rules."""

  def score(frozen, batch):
    scores = compute_scalar_scores(model, frozen["reward"], batch, suffix)
    scores += compute_stop_penalty(batch, eos, penalty=penalty)
    scores += compute_length_bonus(batch, coef=length_coef, longest=longest)
    return scores, jnp.isfinite(scores)

  return jax.named_call(score, name="score")


def split_reward_terms(
  scores: Float[np.ndarray, " batch"],
  lengths: Int[np.ndarray, " batch"],
  stopped: Bool[np.ndarray, " batch"],
  *,
  penalty: float,
  length_coef: float,
  longest: int,
) -> dict[str, Float[np.ndarray, " batch"]]:
  """What scores of `reward` are the sum of; a rule whose weight is 0 is no term.

  Args:
    lengths: of the responses, in tokens.
    stopped: whether a response came to its end.
  """
  rules = {}
  if penalty:
    rules["no end"] = np.where(stopped, 0.0, penalty)
  if length_coef:
    rules["length"] = length_coef * lengths / longest
  return {"reward model": scores - sum(rules.values()), **rules}
