"""Samples responses, and computes log-probabilities of responses.

`generate` runs prefill once per prompt and then decodes one token per step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlmrlaif_jax.core.types import (
  Batch,
  Groups,
  PackedBatch,
  Params,
  Stops,
  continue_positions,
)
from vlmrlaif_jax.losses.logprobs import chunked_target_logps
from vlmrlaif_jax.models.vlm import VLM, encode_video
from vlmrlaif_jax.sampling.continuous_batching import generate_continuously
from vlmrlaif_jax.sampling.decode_state import (
  DecodeSettings,
  advance_rows,
  begin_rows,
  make_sampler,
  unroll_rings,
)

# Settings of a method that `generate` takes as they are.
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "samples", "slots")


class SampledResponses(NamedTuple):
  """Responses to prompts, the rows of one prompt together."""

  batch: Batch  # Prompts and responses; loss_mask marks responses, EOS included.
  # log p(token) under softmax(logits / temperature), or softmax(logits) if that is 0;
  # Log-probabilities in nats, 0 outside the response. They use the full softmax at the
  # temperature, without top_p, top_k and vocab, so that losses recompute the same.
  logps: Float[Array, "batch time"]


def split_row_keys(
  key: Key[Array, ""], ids: Int[Array, " batch"], samples: int
) -> Key[Array, "batch samples"]:
  """Returns a key for each sample of each prompt, independent of the other prompts."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  prompts = fold(key, ids)
  return jax.vmap(fold, in_axes=(0, None))(prompts, jnp.arange(samples))


def generate(
  model: VLM,
  variables: Params,
  prompts: Batch,
  key: Key[Array, ""],
  *,
  max_new: int,
  temperature: float,
  top_p: float = 1.0,
  top_k: int = 0,
  stops: Stops,
  pad: int,
  samples: int = 1,
  ids: Int[Array, " batch"] | None = None,
  vocab: int | None = None,
  slots: int = 0,
) -> SampledResponses:
  """Samples responses to each prompt with the model that is trained.

  Args:
    model: the policy.
    variables: variables of the model, with or without "lora".
    prompts: prompts padded on the left, so that all rows end in the same column. A row
      of padding alone gets an empty response.
    key: random key of the batch.
    max_new: maximum length of a response, in tokens.
    temperature: sampling temperature; 0 is greedy decoding.
    top_p: nucleus probability mass; 1 disables it. See truncate_logits.
    top_k: number of candidate tokens; 0 disables it.
    stops: ids of the EOS tokens, each of which ends a response.
    pad: id of the padding after it.
    samples: responses per prompt.
    ids: id of each prompt; None for its row number. A response depends on key and id,
      not on its row.
    vocab: number of ids that may be sampled, if the embedding matrix is larger than the
      tokenizer; None for all.
    slots: responses that are decoded concurrently; 0 for all. When one ends, the next
      prompt starts. Responses do not depend on it.
  """
  settings = DecodeSettings(max_new, temperature, top_p, top_k, stops, pad, vocab)
  prompts = encode_video(model, variables, prompts)
  ids = jnp.arange(len(prompts.tokens)) if ids is None else ids
  keys = split_row_keys(key, ids, samples)
  sampler = make_sampler(model, variables, settings)
  if 0 < slots < keys.size:
    responses = generate_continuously(sampler, prompts, keys, slots)
  else:
    _, rows = advance_rows(sampler, begin_rows(sampler, prompts, keys), jnp.int32(1))
    responses = unroll_rings(rows.responses)
  return join_responses(
    prompts, responses.tokens, responses.mask, responses.logps, samples=samples
  )


def join_responses(
  prompts: Batch,
  tokens: Int[Array, "rows new"],
  mask: Bool[Array, "rows new"],
  logps: Float[Array, "rows new"],
  *,
  samples: int,
) -> SampledResponses:
  """Returns the responses after copies of their prompts.

  Args:
    prompts: prompts, whose video is features.
    tokens: ids of the responses, those of one prompt adjacent.
    mask: True for tokens of a response, False for the padding after it.
    logps: log-probability of each token, in nats.
    samples: responses per prompt.
  """
  prompts = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
  join = lambda first, second: jnp.concatenate([first, second], axis=1)
  positions = continue_positions(prompts, mask)
  batch = Batch(
    prompts.video,
    join(prompts.tokens, tokens),
    join(prompts.mask, mask),
    join(prompts.mask & False, mask),
    join(prompts.positions, positions),
  )
  return SampledResponses(batch, join(jnp.zeros(prompts.tokens.shape), logps))


def compute_response_logps(
  model: Any,
  variables: Params,
  batch: Batch | PackedBatch,
  *,
  start: int,
  chunk: int,
  temperature: float,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
  """Computes the log-probabilities that `generate` recorded, and entropies.

  Args:
    model: the policy.
    variables: variables of the model.
    batch: prompts and responses.
    start: column of the responses' first tokens. Earlier columns have no logits.
    chunk: time steps whose logits are computed together.
    temperature: temperature at which the responses were sampled.

  Returns:
    Log-probability (0 outside the response) and entropy (0 before `start`) of each
    token, in nats.
  """
  hidden = model.apply(variables, batch, method="hidden")
  head = model.apply(variables, method="head_kernel")
  outputs = chunked_target_logps(
    hidden[:, start - 1 : -1],
    head,
    batch.tokens[:, start:],
    chunk=chunk,
    temperature=temperature,
  )
  logps, entropy = (jnp.pad(x, [(0, 0), (start, 0)]) for x in outputs)
  return jnp.where(batch.loss_mask, logps, 0.0), entropy


def compute_group_logps(
  model: Any,
  variables: Params,
  groups: Groups,
  *,
  shared: bool,
  chunk: int,
  temperature: float,
  rngs: Mapping[str, Array] | None = None,
) -> tuple[Float[Array, "prompts group time"], Float[Array, "prompts group time"]]:
  """Computes the same as compute_response_logps for groups, without prompt columns.

  Args:
    model: the policy.
    variables: variables of the model.
    groups: responses, grouped by prompt.
    shared: whether a prompt is run once for its group; see VLM.hidden_groups.
    chunk: time steps whose logits are computed together.
    temperature: temperature at which the responses were sampled.
    rngs: random keys of dropout; None disables it.
  """
  states = model.apply(
    variables, groups, shared=shared, method="hidden_groups", rngs=rngs
  )
  first = jnp.broadcast_to(
    states.prompts[:, None, None],
    (*groups.tokens.shape[:2], 1, states.prompts.shape[1]),
  )
  logps, entropy = chunked_target_logps(
    jnp.concatenate([first, states.responses[:, :, :-1]], axis=2),
    model.apply(variables, method="head_kernel"),
    groups.tokens,
    chunk=chunk,
    temperature=temperature,
  )
  return jnp.where(groups.loss_mask, logps, 0.0), entropy
