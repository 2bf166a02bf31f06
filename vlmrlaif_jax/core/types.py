"""Batches, rollouts, losses and methods as NamedTuples of arrays.

Index t of every per-token array belongs to token t. `logps[t]` is
log p(tokens[t] | tokens[<t]). `values[t]` is the value of the state in which token t is
sampled. Index 0 has no prediction and contains 0. In the responses of `Groups`, index 0
is the first token of the response, which the prompt predicts.

Positions belong to tokens, like their ids. Tokenization counts them on one axis, or on
three for time, height and width. `continue_positions` extends them; no other code
derives positions.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

Params: TypeAlias = PyTree  # Nested dict of arrays, as Flax creates it.
AnyArray: TypeAlias = Array | np.ndarray  # NumPy on the host, JAX on devices.
Stops: TypeAlias = tuple[int, ...]  # Ids of the EOS tokens, which end a response.
Metrics: TypeAlias = dict[str, Array]  # Name -> scalar.
Phase: TypeAlias = Callable[[str], AbstractContextManager]  # See PhaseTimer.

# Placeholder of a video feature. No vocabulary contains it, so it is never sampled.
VIDEO_TOKEN = -1


class Batch(NamedTuple):
  """A batch of token sequences, each about one video."""

  # Pixels (uint8), or features of the vision tower. Those of a family whose videos have
  # different numbers of tokens are padded to one length.
  video: (
    UInt8[AnyArray, "batch frames height width 3"]
    | Float[AnyArray, "batch *places channels"]
  )
  tokens: Int[AnyArray, "batch time"]  # VIDEO_TOKEN at each video feature.
  mask: Bool[AnyArray, "batch time"]  # False at padding.
  loss_mask: Bool[AnyArray, "batch time"]  # True at tokens of the response.
  positions: Int[AnyArray, "batch time axes"]  # Rotary positions; 0 at padding.


class PackedBatch(NamedTuple):
  """A batch of rows that each contain several examples.

  An example is a segment of its row. Attention is limited to the segment.
  """

  # Features; 0 in unused slots.
  video: Float[AnyArray, "batch videos *places channels"]
  # Index of each segment's video within the row.
  video_of: Int[AnyArray, "batch segments"]
  tokens: Int[AnyArray, "batch time"]  # See Batch; no padding within a segment.
  segments: Int[AnyArray, "batch time"]  # Counted from 1 in each row; 0 is padding.
  loss_mask: Bool[AnyArray, "batch time"]  # True at tokens of a response.
  positions: Int[AnyArray, "batch time axes"]  # Of each token within its example.


class Groups(NamedTuple):
  """Prompts, each with a group of responses; the group shares one copy of its prompt.

  Preferences are groups of two: the chosen response, then the rejected one.
  """

  prompts: Batch  # Padded on the left, so that all prompts end at the same index.
  tokens: Int[AnyArray, "prompts group time"]  # Tokens of the responses.
  mask: Bool[AnyArray, "prompts group time"]  # False at padding.
  loss_mask: Bool[AnyArray, "prompts group time"]  # True at tokens of the responses.
  positions: Int[AnyArray, "prompts group time axes"]  # Each continues its prompt's.


class ComparedPairs(NamedTuple):
  """Preferences with the log-probabilities of a reference policy."""

  pairs: Groups  # Chosen and rejected responses.
  ref_logps: Float[AnyArray, "prompts 2"]  # Sums over whole responses.


class Rollout(NamedTuple):
  """Sampled responses with the quantities that a policy loss requires."""

  batch: Batch  # Prompts with responses.
  old_logps: Float[Array, "batch time"]  # Under the policy that sampled.
  ref_logps: Float[Array, "batch time"]  # Under the frozen reference policy.
  old_values: Float[Array, "batch time"]  # Values of the critic before the update.
  advantages: Float[Array, "batch time"]
  returns: Float[Array, "batch time"]
  # Factor of each token's policy loss: its importance weight against the sampler, or 1.
  policy_weights: Float[Array, "batch time"]


class TrainState(NamedTuple):
  """The content of a checkpoint: trained parameters, without frozen weights."""

  step: Int[Array, ""]  # Number of finished steps.
  params: Params  # LoRA factors, projector and heads.
  opt_state: PyTree  # State of the optimizer.


@jax.tree_util.register_pytree_node_class
class Frozen(dict):
  """Frozen weights by role, as a pytree that contains shared arrays only once.

  A jitted function has one argument per leaf. If the base appears once per role, XLA
  counts its memory as often and rejects programs that fit.
  """

  def tree_flatten(self):
    """Returns the distinct leaves, and where each of them belongs."""
    leaves, tree = jax.tree.flatten(dict(self))
    distinct = {id(leaf): leaf for leaf in leaves}
    places = {key: place for place, key in enumerate(distinct)}
    return list(distinct.values()), (tree, tuple(places[id(leaf)] for leaf in leaves))

  @classmethod
  def tree_unflatten(cls, structure, leaves):
    """Rebuilds the weights of all roles from the distinct leaves."""
    tree, places = structure
    return cls(jax.tree.unflatten(tree, [leaves[place] for place in places]))


class Loss(NamedTuple):
  """A mean loss, and the number of items (tokens, pairs) of the mean.

  Microbatches are averaged by weight, so that their number does not change the
  gradient.
  """

  mean: Float[Array, ""]
  weight: Float[Array, ""]  # Number of items.
  metrics: Metrics  # Means over the same items.


class ModelPass(NamedTuple):
  """One pass of a model over a batch, or over its microbatches in turn.

  The planner derives operations and bytes from these numbers.
  """

  phase: str  # "encode", "prefill", "decode", "forward" or "train".
  role: str  # Role in `frozen` whose weights are read.
  model: Any  # A VLM.
  rows: int  # Rows of the batch; for groups, the number of prompts.
  time: int  # Tokens of a prompt and a response; for decoding, slots of the cache.
  new: int = 0  # Tokens to decode.
  logits: bool = True  # False for scalar heads, which compute no logits.
  # Frames of each row's video, or its features in a family whose videos have different
  # numbers of them.
  frames: int = 0
  parts: float = 1  # Microbatches; for decoding, rows per slot.
  chunk: int = 128  # Time steps whose logits exist concurrently.
  start: int = 0  # Tokens of the prompt, for which no logits are computed.
  group: int = 1  # Responses in a row, which share one prompt.
  grid: tuple[int, int] = (0, 0)  # Patches of a frame to encode, along each axis.


def _no_score(
  frozen: Params, batch: Batch
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
  raise ValueError("MethodModels.score is missing: pass it for a method with scores")


@runtime_checkable
class RemoteSampler(Protocol):
  """Samples the responses of a rollout elsewhere, in two parts; see Collector."""

  def begin(self, key: Array, params: Params, frozen: Params, data: Any) -> Any:
    """Sends the prompts, and does not wait for the responses."""
    ...

  def finish(self, pending: Any) -> Any:
    """Waits for the responses to what `begin` returned."""
    ...


class MethodModels(NamedTuple):
  """The models of a training method; stages/training builds them from the config."""

  policy: Any = None  # A Flax module.
  critic: Any = None  # A Flax module.
  reward_model: Any = None  # A Flax module.
  # (frozen, batch) -> (score of each response, whether it is valid). The rows of one
  # prompt are adjacent, so that a scoring function can compare them.
  score: Callable[
    [Params, Batch], tuple[Float[AnyArray, " batch"], Bool[AnyArray, " batch"]]
  ] = _no_score
  # Samples responses elsewhere; None samples with the devices that train.
  sampler: "RemoteSampler | None" = None


def ignore_phase(phase: str) -> AbstractContextManager:
  """Returns a Phase that measures nothing."""
  return nullcontext()


@dataclasses.dataclass(frozen=True)  # JAX treats a tuple as a pytree, not a function.
class Collector:
  """The collection of experience in two parts, between which other work can start.

  Attributes:
    begin: (key, params, frozen, data) -> sampled. It does not wait for the device.
    finish: (params, frozen, sampled, phase) -> (experience, info), with the same
      params. It waits for samples in the phase "sample" and for scores in "score".
  """

  begin: Callable[[Array, Params, Params, Any], Any]
  finish: Callable[[Params, Params, Any, Phase], tuple[Any, dict[str, Array]]]

  def __call__(
    self, key: Array, params: Params, frozen: Params, data: Any
  ) -> tuple[Any, dict[str, Array]]:
    """Samples and scores a rollout; returns it with its metrics."""
    sampled = self.begin(key, params, frozen, data)
    return self.finish(params, frozen, sampled, ignore_phase)


class Method(NamedTuple):
  """A training method: its input, its collection of experience and its loss.

  Attributes:
    reads: Batch or Groups, the type that the data pipeline builds.
    collect: (key, params, frozen, data) -> (experience, info). Scalars in the dict
      `info` are logged; arrays with one row per response go to the samples. It is
      `offline` for a method that trains on the data itself.
    loss: (params, frozen, experience) -> Loss. A pure function, which is jitted.
  """

  reads: type
  collect: Collector
  loss: Callable[[Params, Params, Any], Loss]


offline = Collector(
  begin=lambda key, params, frozen, data: data,
  finish=lambda params, frozen, data, phase: (data, {}),
)


def group_rows(batch: Batch, *, group: int, start: int) -> Groups:
  """Converts rows to groups of responses that share a prompt.

  Args:
    batch: Rows, those of one prompt adjacent.
    group: Responses per prompt.
    start: Index of the responses' first tokens, where the prompt ends.
  """
  video, *columns = (x.reshape(-1, group, *x.shape[1:]) for x in batch)
  prompts = Batch(video[:, 0], *(x[:, 0, :start] for x in columns))
  return Groups(prompts, *(x[:, :, start:] for x in columns))


def flatten_groups(groups: Groups) -> Batch:
  """Returns one row per response, after its prompt; the inverse of `group_rows`."""
  count, group, _ = groups.tokens.shape
  repeat = lambda x: jnp.repeat(x, group, axis=0)
  rows = lambda prompt, response: jnp.concatenate(
    [repeat(prompt), response.reshape(count * group, *response.shape[2:])], axis=1
  )
  video, *columns = groups.prompts
  return Batch(repeat(video), *map(rows, columns, groups[1:]))


def get_next_positions(rows: Batch | Groups) -> Int[Array, "*batch"]:
  """Returns the position after the last token of each row: the maximum plus 1.

  The maximum is over real tokens and all axes: the position of a video's last token may
  be far from the number of tokens, and is not the same on all axes.
  """
  where = rows.mask[..., None]
  following = jnp.max(rows.positions, axis=(-2, -1), where=where, initial=-1) + 1
  if isinstance(rows, Groups):  # A response may be empty.
    following = jnp.maximum(following, get_next_positions(rows.prompts)[:, None])
  return following


def continue_positions(
  rows: Batch | Groups, text: Bool[AnyArray, "*batch new"]
) -> Int[Array, "*batch new axes"]:
  """Returns the positions of text that follows rows: a response or a suffix.

  They are consecutive and equal on all axes, from the row's `get_next_positions`. They
  are 0 at padding.

  Args:
    rows: Rows of prompts or responses.
    text: True for the real tokens of the text. A row may have several texts.

  >>> mask = jnp.array([[True, True, False]])
  >>> row = Batch(None, None, mask, None, jnp.array([[[0], [7], [0]]]))
  >>> print(continue_positions(row, jnp.array([[True, True]]))[..., 0])
  [[8 9]]
  """
  start = get_next_positions(rows)
  start = start.reshape(*start.shape, *[1] * (text.ndim - start.ndim))
  at = jnp.where(text, start + jnp.cumsum(text, axis=-1) - 1, 0)
  shape = (*text.shape, rows.positions.shape[-1])
  return jnp.broadcast_to(at[..., None], shape).astype(rows.positions.dtype)


def merge_params(frozen: Params, trained: Params) -> Params:
  """Merges nested dicts of variables; trained leaves replace frozen ones."""
  if not isinstance(trained, dict) or not isinstance(frozen, dict):
    return trained
  both = {**frozen, **trained}
  return {
    k: merge_params(frozen[k], trained[k]) if k in frozen and k in trained else v
    for k, v in both.items()
  }


# Entry of the frozen arrays with the random key of an update, for dropout.
DROPOUT_KEY = "dropout"


def select_rngs(frozen: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the random keys of an update for `apply`; none without dropout."""
  return {DROPOUT_KEY: frozen[DROPOUT_KEY]} if DROPOUT_KEY in frozen else {}


def is_stop(tokens: Int[AnyArray, "*rows"], stops: Stops) -> Bool[AnyArray, "*rows"]:
  """Returns whether each token is an EOS token. There is at least one of them.

  >>> is_stop(np.array([3, 7, 5]), (5, 7)).tolist()
  [False, True, True]
  """
  return functools.reduce(operator.or_, [tokens == stop for stop in stops])


def has_stop(batch: Batch, stops: Stops) -> Bool[Array, " batch"]:
  """Returns whether each response contains an EOS token."""
  return jnp.any(is_stop(batch.tokens, stops) & batch.loss_mask, axis=1)
