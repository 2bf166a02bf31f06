"""Supervised fine-tuning: next-token cross-entropy on the response."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import (
  Batch,
  Loss,
  Method,
  MethodModels,
  PackedBatch,
  merge_params,
  offline,
  select_rngs,
)
from vlmrlaif_jax.losses.logprobs import chunked_token_logps
from vlmrlaif_jax.losses.masked import masked_mean


def default_config() -> ConfigDict:
  """Returns the settings of SFT."""
  return ConfigDict(dict(chunk=128))  # Time steps whose logits are computed together.


def make(config: ConfigDict, parts: MethodModels) -> Method:
  """Returns SFT, which trains the role "policy" on padded or packed examples."""
  policy = parts.policy

  def loss(params, frozen, batch: Batch | PackedBatch) -> Loss:
    variables = merge_params(frozen["policy"], params["policy"])
    rngs = select_rngs(frozen)
    hidden = policy.apply(variables, batch, method="hidden", rngs=rngs)
    head = policy.apply(variables, method="head_kernel")
    logps = chunked_token_logps(hidden, head, batch.tokens, chunk=config.chunk)
    nll = masked_mean(-logps, batch.loss_mask)
    weight = jnp.sum(batch.loss_mask).astype(jnp.float32)
    probability = masked_mean(jnp.exp(logps), batch.loss_mask)
    return Loss(nll, weight, {"probability": probability})

  return Method(Batch, offline, loss)
