"""The part of sampling on servers that a plan of the devices contains."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from vlmrlaif_jax.core.types import Batch, Params, merge_params
from vlmrlaif_jax.models.vlm import VLM, encode_video
from vlmrlaif_jax.sampling.generate import SampledResponses, join_responses


class PlannedSampler(NamedTuple):
  """The shapes of a rollout that servers sample, for a plan of the devices.

  No program of the devices computes its arrays, which are zeros.
  """

  policy: VLM
  samples: int
  max_new: int

  def begin(
    self, key: Key[Array, ""], params: Params, frozen: Params, prompts: Batch
  ) -> Batch:
    """Returns the encoded prompts."""
    variables = merge_params(frozen["policy"], params["policy"])
    return _fill_zeros(functools.partial(encode_video, self.policy), variables, prompts)

  def finish(self, pending: Batch) -> SampledResponses:
    """Returns the responses."""

    def join(prompts: Batch) -> SampledResponses:
      shape = (len(prompts.tokens) * self.samples, self.max_new)
      tokens, logps = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
      return join_responses(prompts, tokens, tokens > 0, logps, samples=self.samples)

    return _fill_zeros(join, pending)


def _fill_zeros(call: Callable[..., Any], *args: Any) -> Any:
  """Returns zeros in the shapes of a function's result."""
  shapes = jax.eval_shape(call, *args)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
