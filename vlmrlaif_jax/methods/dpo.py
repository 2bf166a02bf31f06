"""Direct preference optimisation: pairs straight into the policy.

Rafailov et al. 2023 (2305.18290), with the settings of RLAIF-V (2405.17220).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vlmrlaif_jax.generate import response_logps
from vlmrlaif_jax.losses.logprobs import sequence_logps
from vlmrlaif_jax.losses.masked import row_mean
from vlmrlaif_jax.losses.preference import dpo_loss
from vlmrlaif_jax.types import Batch, Loss, Method, Pairs, Params, Parts, join, offline

# What stands for a response: the log-probability of all of it, or of a mean token.
RESPONSE_LOGPS = {"sum": sequence_logps, "mean": row_mean}


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      beta=0.1,  # Of the log-ratio to the reference: how dear it is to leave it.
      label_smoothing=0.0,  # Probability that a preference is the wrong way round.
      logps="sum",  # A key of RESPONSE_LOGPS.
      dpo_coef=1.0,
      sft_coef=0.0,  # Of the chosen response's -log p, beside the preference.
      chunk=128,  # Time steps whose logits exist at once.
    )
  )


def make(config: ConfigDict, parts: Parts) -> Method:
  """The method; it trains the role "policy".

  It reads from frozen: "policy" and "ref". The reference's log-probabilities are
  computed at each step and kept nowhere, so they cannot be those of another model.
  Both answers of a pair go through in one forward pass: their rows share a video.
  """
  _check(config)
  policy, whole = parts.policy, RESPONSE_LOGPS[config.logps]

  def logps_of(variables: Params, batch: Batch) -> Float[Array, " batch"]:
    """Of each response, at temperature 1."""
    logps, _ = response_logps(
      policy, variables, batch, chunk=config.chunk, temperature=1.0
    )
    return whole(logps, batch.loss_mask)

  def loss(params, frozen, pairs: Pairs) -> Loss:
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pairs)
    logps = logps_of(join(frozen["policy"], params["policy"]), both)
    ref_logps = logps_of(frozen["ref"], both)
    chosen, rejected = jnp.split(logps, 2)
    preference = dpo_loss(
      chosen,
      rejected,
      *jnp.split(ref_logps, 2),
      beta=config.beta,
      label_smoothing=config.label_smoothing,
    )
    each = config.dpo_coef * preference - config.sft_coef * chosen
    rewards = jnp.split(config.beta * (logps - ref_logps), 2)
    return Loss(
      jnp.mean(each),
      jnp.float32(len(chosen)),
      {
        "dpo_loss": jnp.mean(preference),
        "accuracy": jnp.mean(rewards[0] > rewards[1]),
        "margin": jnp.mean(rewards[0] - rewards[1]),
        "chosen_reward": jnp.mean(rewards[0]),
        "rejected_reward": jnp.mean(rewards[1]),
        "chosen_logps": jnp.mean(chosen),
        "rejected_logps": jnp.mean(rejected),
      },
    )

  return Method(Pairs, offline, loss)


def _check(config: ConfigDict) -> None:
  if config.logps not in RESPONSE_LOGPS:
    names = " or ".join(f'"{name}"' for name in RESPONSE_LOGPS)
    raise ValueError(f"logps must be {names}, not {config.logps!r}")
  if config.beta <= 0:
    raise ValueError(f"beta must be above 0, not {config.beta}")
  if not 0 <= config.label_smoothing <= 0.5:
    raise ValueError(
      f"label_smoothing must be from 0 to 0.5, not {config.label_smoothing}: above "
      "that, swap chosen and rejected"
    )
