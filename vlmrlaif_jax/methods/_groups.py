"""Groups of sampled responses with scores, and the selection among them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlmrlaif_jax.core.types import AnyArray, Groups, Stops, group_rows, has_stop
from vlmrlaif_jax.losses import ranking
from vlmrlaif_jax.losses.masked import masked_mean
from vlmrlaif_jax.sampling.generate import SampledResponses


class ScoredGroups(NamedTuple):
  """Groups of sampled responses with their scores."""

  groups: Groups
  sampler_logps: Float[Array, "prompts group time"]  # As the sampler recorded them.
  scores: Float[Array, "prompts group"]  # 0 where invalid.
  valid: Bool[Array, "prompts group"]  # Whether a response has a score.
  stopped: Bool[Array, "prompts group"]  # Whether a response has an EOS token.
  compared_scores: Float[Array, "prompts group"]  # Treated for truncated responses.
  compared: Bool[Array, "prompts group"]  # Whether a response is compared.


def group_scores(
  sampled: SampledResponses,
  scores: Float[Array, " batch"],
  valid: Bool[Array, " batch"],
  *,
  samples: int,
  max_new: int,
  stops: Stops,
  treat_truncated: Callable[..., tuple[Array, Array]],
) -> ScoredGroups:
  """Arranges sampled responses and their scores by prompt.

  Args:
    sampled: responses, those of one prompt adjacent.
    scores: scores of the responses. One that is not finite is invalid.
    valid: whether a response has a score.
    samples: responses per prompt.
    max_new: maximum length of a response, in tokens.
    stops: ids of the EOS tokens.
    treat_truncated: function of (scores, valid, stopped, fill) that returns the scores
      to compare and whether a response is compared. `fill` is the length of a response
      divided by max_new.
  """
  batch, start = sampled.batch, sampled.logps.shape[1] - max_new
  groups = group_rows(batch, group=samples, start=start)
  to_groups = lambda x: x.reshape(-1, samples)
  scores, valid, stopped = map(to_groups, (scores, valid, has_stop(batch, stops)))
  valid &= jnp.isfinite(scores)
  scores = jnp.where(valid, scores, 0.0)
  fill = jnp.sum(groups.loss_mask, axis=2) / max_new
  compared_scores, compared = treat_truncated(scores, valid, stopped, fill)
  sampler_logps = sampled.logps[:, start:].reshape(groups.tokens.shape)
  return ScoredGroups(
    groups, sampler_logps, scores, valid, stopped, compared_scores, compared
  )


def select_groups(
  scored: ScoredGroups, count: int
) -> tuple[ScoredGroups, dict[str, AnyArray]]:
  """Selects the `count` groups whose scores differ most, in their order.

  Returns:
    The groups, and info. "sampled_rows" is the position of each response in the sampled
    batch. The means "tied_sampled" and "reward_sampled" are over all sampled groups.
  """
  scores, compared = scored.compared_scores, scored.compared
  selected = ranking.select_differing_groups(scores, compared, count)
  info: dict[str, AnyArray] = {
    "sampled_rows": jnp.arange(scores.size).reshape(scores.shape)[selected].reshape(-1),
    "tied_sampled": jnp.mean(ranking.are_tied(scores, compared)),
    "reward_sampled": masked_mean(scored.scores, scored.valid),
  }
  return jax.tree.map(lambda x: x[selected], scored), info
