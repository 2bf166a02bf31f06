"""Sampling responses: prompts are read once, then one token at a time is added."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlmrlaif_jax.losses.logprobs import chunked_token_logps
from vlmrlaif_jax.models.layers import KVCache
from vlmrlaif_jax.models.vlm import encode_video, token_positions
from vlmrlaif_jax.types import Batch, Packed, Params


class Sampled(NamedTuple):
  """Responses to prompts, the rows of one prompt together."""

  batch: Batch  # Prompts and responses; loss_mask marks responses, eos included.
  # log p(token) under softmax(logits / temperature), or softmax(logits) if that is 0;
  # 0 outside the response. What top_p, top_k and vocab cut away counts as possible
  # here, so that a loss which divides its logits by the temperature finds the same.
  logps: Float[Array, "batch time"]


class _State(NamedTuple):
  """What one step of decoding hands to the next."""

  step: Int[Array, ""]  # How many tokens have been sampled.
  tokens: Int[Array, "batch slots"]
  mask: Bool[Array, "batch slots"]
  logps: Float[Array, "batch slots"]
  done: Bool[Array, " batch"]
  caches: tuple[KVCache, ...]


def truncate(
  logits: Float[Array, "*batch vocab"], *, top_p: float, top_k: int
) -> Float[Array, "*batch vocab"]:
  """-inf wherever a token is not to be sampled; ties with the last one stay.

  Args:
    logits: of the distribution to be cut.
    top_p: keep the likeliest tokens that together reach this probability (Holtzman
      et al. 2019, 1904.09751); 1 keeps all.
    top_k: keep this many tokens at most; 0 keeps all. It is applied first.
  """
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.min(
      ranked, axis=-1, keepdims=True, where=before < top_p, initial=jnp.inf
    )
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def sample_token(
  keys: Key[Array, " batch"],
  logits: Float[Array, "batch vocab"],
  *,
  temperature: float,
  top_p: float = 1.0,
  top_k: int = 0,
) -> Int[Array, " batch"]:
  """One token a row, each by a key of its own; the likeliest at temperature 0."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1)
  logits = truncate(logits / temperature, top_p=top_p, top_k=top_k)
  return jax.vmap(jax.random.categorical)(keys, logits)


def row_keys(
  key: Key[Array, ""], ids: Int[Array, " batch"], samples: int
) -> Key[Array, " rows"]:
  """A key for each sample of each prompt, whatever other prompts are beside it."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  prompts = fold(key, ids)
  return jax.vmap(fold, in_axes=(0, None))(prompts, jnp.arange(samples)).reshape(-1)


def generate(
  model: nn.Module,
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
) -> Sampled:
  """Samples responses to each prompt, from the very model that is trained.

  Args:
    model: a VLM.
    variables: of the model, "lora" included or not.
    prompts: padded on the left, so that every row ends at the same place.
    key: of the sampling.
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
  """
  prompts = encode_video(model, variables, prompts)
  count, start = prompts.tokens.shape
  keys = row_keys(key, jnp.arange(count) if ids is None else ids, samples)
  widen = lambda x, fill: jnp.pad(x, [(0, 0), (0, max_new)], constant_values=fill)

  def sample(state: _State, hidden: Float[Array, "batch embed"]) -> _State:
    logits = model.apply(variables, hidden, method="logits_of")
    known = logits
    if vocab is not None:
      known = jnp.where(jnp.arange(logits.shape[1]) < vocab, logits, -jnp.inf)
    now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
    token = sample_token(now, known, temperature=temperature, top_p=top_p, top_k=top_k)
    logp = jnp.take_along_axis(
      jax.nn.log_softmax(logits / (temperature or 1.0)), token[:, None], axis=1
    )[:, 0]
    return _add(state, start + state.step, token, logp, eos=eos, pad=pad)

  def step(state: _State) -> _State:
    slot = start + state.step - 1  # Of the token that was sampled last.
    here = lambda x: jax.lax.dynamic_index_in_dim(x, slot, axis=1, keepdims=False)
    position = here(token_positions(state.mask))
    read = (here(state.tokens), position, slot, state.mask, state.caches)
    hidden, caches = model.apply(variables, *read, method="decode")
    return sample(state._replace(caches=caches), hidden)

  read = model.apply(variables, prompts, start + max_new, method="prefill")
  prompts, (hidden, caches) = jax.tree.map(
    lambda x: jnp.repeat(x, samples, axis=0), (prompts, read)
  )
  state = _State(
    step=jnp.zeros((), jnp.int32),
    tokens=widen(prompts.tokens, pad),
    mask=widen(prompts.mask, False),
    logps=jnp.zeros((len(keys), start + max_new)),
    done=jnp.zeros(len(keys), bool),
    caches=caches,
  )
  state = jax.lax.while_loop(
    lambda state: (state.step < max_new) & ~jnp.all(state.done),
    step,
    sample(state, hidden),
  )
  response = jnp.arange(start + max_new) >= start
  batch = Batch(prompts.video, state.tokens, state.mask, state.mask & response)
  return Sampled(batch, state.logps)


def _add(
  state: _State,
  slot: Int[Array, ""],
  token: Int[Array, " batch"],
  logp: Float[Array, " batch"],
  *,
  eos: int,
  pad: int,
) -> _State:
  """The state with one more token in each row that has not ended."""
  put = lambda x, column: jax.lax.dynamic_update_index_in_dim(
    x, column.astype(x.dtype), slot, axis=1
  )
  return state._replace(
    step=state.step + 1,
    tokens=put(state.tokens, jnp.where(state.done, pad, token)),
    mask=put(state.mask, ~state.done),
    logps=put(state.logps, jnp.where(state.done, 0.0, logp)),
    done=state.done | (token == eos),
  )


def response_logps(
  model: Any,
  variables: Params,
  batch: Batch | Packed,
  *,
  chunk: int,
  temperature: float,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
  """(log-probability, 0 outside the response; entropy) of each token: what `generate`
  recorded, computed anew.

  Args:
    model: a VLM.
    chunk: time steps whose logits exist at once.
    temperature: at which the responses were sampled.
  """
  hidden = model.apply(variables, batch, method="hidden")
  head = model.apply(variables, method="head_kernel")
  logps, entropy = chunked_token_logps(
    hidden, head, batch.tokens, chunk=chunk, temperature=temperature
  )
  return jnp.where(batch.loss_mask, logps, 0.0), entropy
