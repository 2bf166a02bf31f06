"""Sampling responses: prompts are read once, then one token at a time is added."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vlmrlaif_jax.core.types import Batch, Groups, PackedBatch, Params
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

  batch: Batch  # Prompts and responses; loss_mask marks responses, eos included.
  # log p(token) under softmax(logits / temperature), or softmax(logits) if that is 0;
  # 0 outside the response. What top_p, top_k and vocab cut away counts as possible
  # here, so that a loss which divides its logits by the temperature finds the same.
  logps: Float[Array, "batch time"]


def split_row_keys(
  key: Key[Array, ""], ids: Int[Array, " batch"], samples: int
) -> Key[Array, "batch samples"]:
  """A key for each sample of each prompt, whatever other prompts are beside it."""
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
  eos: int,
  pad: int,
  samples: int = 1,
  ids: Int[Array, " batch"] | None = None,
  vocab: int | None = None,
  slots: int = 0,
) -> SampledResponses:
  """Samples responses to each prompt, from the very model that is trained.

  Args:
    variables: of the model, "lora" included or not.
    prompts: padded on the left, so that every row ends at the same place. One without
      a token, which fills up a batch, gets an empty response.
    max_new: longest response, in tokens; shorter ones end in eos and then pad.
    temperature: 0 for greedy.
    top_p: see truncate.
    top_k: see truncate.
    eos: id of the token that ends a response.
    pad: id of what comes after it.
    samples: responses to each prompt, which is read only once.
    ids: of the prompts; what is sampled for one depends on key and its id, not on
      its place in the batch. Its place unless given.
    vocab: ids from here on are never sampled: an embedding matrix is often longer
      than the tokenizer. The model's own size unless given.
    slots: responses in the making at once: where one ends, the next prompt begins. What
      is sampled does not depend on it. 0: all.
  """
  settings = DecodeSettings(max_new, temperature, top_p, top_k, eos, pad, vocab)
  prompts = encode_video(model, variables, prompts)
  ids = jnp.arange(len(prompts.tokens)) if ids is None else ids
  keys = split_row_keys(key, ids, samples)
  sampler = make_sampler(model, variables, settings)
  if 0 < slots < keys.size:
    found = generate_continuously(sampler, prompts, keys, slots)
  else:
    _, rows = advance_rows(sampler, begin_rows(sampler, prompts, keys), jnp.int32(1))
    found = unroll_rings(rows.said)
  prompts = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
  join = lambda first, second: jnp.concatenate([first, second], axis=1)
  batch = Batch(
    prompts.video,
    join(prompts.tokens, found.tokens),
    join(prompts.mask, found.kept),
    join(prompts.mask & False, found.kept),
  )
  return SampledResponses(batch, join(jnp.zeros(prompts.tokens.shape), found.logps))


def compute_response_logps(
  model: Any,
  variables: Params,
  batch: Batch | PackedBatch,
  *,
  start: int,
  chunk: int,
  temperature: float,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
  """(log-probability, 0 outside the response; entropy, 0 before `start`) of each token:
  what `generate` recorded, computed anew.

  Args:
    start: index of the responses' first tokens; what is before has no logits made.
    chunk: time steps whose logits exist at once.
    temperature: at which the responses were sampled.
  """
  hidden = model.apply(variables, batch, method="hidden")
  head = model.apply(variables, method="head_kernel")
  made = chunked_target_logps(
    hidden[:, start - 1 : -1],
    head,
    batch.tokens[:, start:],
    chunk=chunk,
    temperature=temperature,
  )
  logps, entropy = (jnp.pad(x, [(0, 0), (start, 0)]) for x in made)
  return jnp.where(batch.loss_mask, logps, 0.0), entropy


def compute_group_logps(
  model: Any,
  variables: Params,
  groups: Groups,
  *,
  shared: bool,
  chunk: int,
  temperature: float,
) -> tuple[Float[Array, "prompts group time"], Float[Array, "prompts group time"]]:
  """As response_logps, of the responses' tokens alone.

  Args:
    shared: whether prompts are read once for all responses to them; see
      VLM.hidden_groups.
  """
  states = model.apply(variables, groups, shared=shared, method="hidden_groups")
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
